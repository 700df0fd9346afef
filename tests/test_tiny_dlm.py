"""The embedded diffusion language model: its weights, texts and questions, and its training."""

from pathlib import Path
from random import Random

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.pipelines.llada2.pipeline_llada2 import LLaDA2Pipeline

import sparse_dit
from demos.tiny_dlm import measure, train
from demos.tiny_dlm.folder import load_pipeline, new_model, write_pipeline
from demos.tiny_dlm.lessons import LONGEST, draw_lessons
from demos.tiny_dlm.measure import Size, answer, ask_all, infill, log_probs_of, masked_text
from demos.tiny_dlm.muon import Muon
from demos.tiny_dlm.problems import CANVAS, KINDS, Problem, draw_problem, draw_text
from demos.tiny_dlm.text import NAMES, found_village, passages
from demos.tiny_dlm.tokens import MASK, build_tokenizer, number_of

MODEL = Path(__file__).parents[1] / "demos" / "tiny_dlm" / "model"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(MODEL)


@pytest.fixture
def one_short_level(monkeypatch):
    monkeypatch.setattr(train, "LEVELS", ((64, 2),))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_texts_follow_the_seed_and_keep_to_the_village():
    def drawn(seed):
        random = Random(seed)
        village = found_village(5, random)
        source = passages(village, random)
        return village, [next(source) for _ in range(40)]

    (village, texts), again, other = drawn(1), drawn(1), drawn(2)
    assert (village, texts) == again and texts != other[1]
    strangers = set(NAMES) - {who.name for who in village.people}
    assert not strangers & set(" ".join(texts).replace(",", " ").replace(".", " ").split())
    for text in texts:
        lives = [who.home for who in village.people if f"{who.name} the {who.trade} lives" in text]
        assert all(f"near the {home}." in text for home in lives)


@pytest.mark.parametrize("people", [1, len(NAMES) + 1])
def test_a_village_needs_people_with_names(people):
    with pytest.raises(ValueError, match=f"has 2 to {len(NAMES)} people, got {people}"):
        found_village(people, Random(0))


def test_the_shipped_tokenizer_is_the_one_that_training_builds(pipe):
    built, shipped = build_tokenizer(), pipe.tokenizer
    assert built.get_vocab() == shipped.get_vocab() and 1000 <= len(shipped) <= 4000
    said = "Anna paid 48213 złoty — “hm”."
    assert shipped.decode(shipped(said).input_ids).strip() == said
    assert len(shipped(" ".join(NAMES)).input_ids) == len(NAMES)
    assert shipped.tokenize("48213") == ["Ġ", "482", "13"]


def test_lessons_leave_prompts_whole_and_ask_for_what_is_hidden():
    tokenizer = build_tokenizer()
    lessons = draw_lessons(12, 256, Random(3))
    asked = lessons.weight > 0
    assert lessons.seen.shape == (12, 256)
    assert torch.equal(lessons.seen[~asked], lessons.truth[~asked])
    masked = lessons.seen.eq(number_of(MASK))
    assert masked.any(1).all() and asked[masked].all()
    assert not lessons.truth.eq(number_of(MASK)).any()
    torch.testing.assert_close(lessons.weight.sum(1), torch.ones(12))
    assert lessons.key.any() and masked[lessons.key].all()
    assert str(tokenizer.decode(lessons.truth[lessons.key])).isdigit()
    steps = lessons.positions.diff(dim=1)
    assert (lessons.positions[:, 0] == 0).all() and (steps >= 1).all() and (steps > 1).any()
    assert lessons.positions.max() < LONGEST
    for row, key in zip(lessons.truth, lessons.key, strict=True):
        assert all((row == token).sum() >= 2 for token in row[key])  # hidden once, answered once


@pytest.mark.parametrize("kind", KINDS)
def test_problems_have_their_length_and_hold_the_answer(kind):
    for number in range(6):
        problem = draw_problem(300, kind, number / 5, Random(number))
        assert len(problem.tokens) == 300 - CANVAS and problem.prompt.endswith("? Answer:")
        assert len(build_tokenizer()(problem.answer).input_ids) < CANVAS
        if kind != "fact":
            assert problem.prompt.count(problem.answer[:5]) == 1
        assert problem.prompt.count("pass key") == {"key": 2, "named": 4, "fact": 0}[kind]
    early, late = (draw_problem(300, "key", depth, Random(0)) for depth in (0, 1))
    assert early.prompt.index(early.answer[:5]) < late.prompt.index(late.answer[:5])


@pytest.mark.parametrize(("tokens", "kind", "error"), [(100, "key", "192"), (300, "hm", "'hm'")])
def test_problems_that_cannot_be(tokens, kind, error):
    with pytest.raises(ValueError, match=error):
        draw_problem(tokens, kind, 0.5, Random(0))


def test_the_folder_is_small_and_opens_without_our_code(pipe):
    assert sum(f.stat().st_size for f in MODEL.rglob("*")) < 12e6
    opened = LLaDA2Pipeline.from_pretrained(MODEL)
    assert type(opened.model).__name__ == "Qwen3ForCausalLM" and opened.tokenizer is None
    assert opened.model.dtype == torch.bfloat16
    assert pipe.mask_token_id == pipe.tokenizer.mask_token_id is not None


def test_every_token_sees_all_others(pipe):
    tokens = torch.tensor([draw_text(64, Random(0))])
    changed = tokens.clone()
    changed[0, -1] = pipe.tokenizer.mask_token_id
    with torch.no_grad():
        one, other = (pipe.model(ids).logits[0, 0] for ids in (tokens, changed))
    assert not torch.equal(one, other)


def test_it_finds_pass_keys_and_only_where_they_are(pipe):
    found, blind = 0, 0
    for number in range(4):
        problem = draw_problem(240, "key", (number + 0.5) / 4, Random(number))
        found += answer(pipe, problem)[:5] == problem.answer[:5]
        text = problem.prompt.replace(f" is {problem.answer[:5]}.", " is lost.")
        hidden = Problem(pipe.tokenizer(text).input_ids, problem.answer)
        blind += answer(pipe, hidden)[:5] == problem.answer[:5]
    assert found >= 3 and blind == 0


def test_exact_attention_answers_as_stock_does(pipe):
    other = load_pipeline(MODEL)
    with sparse_dit.patch(other.model, "exact") as handle:
        scores = ask_all({"stock": pipe, "exact": other}, Size(192, 1))
    assert handle.summary().dense_calls >= 5 * 4  # its layers, in three answers and a text
    assert scores["stock"].right == scores["exact"].right
    assert scores["exact"].divergence < 1e-5 and scores["stock"].divergence == 0


def test_it_fills_gaps_with_words_that_fit(pipe):
    text, seen = masked_text(pipe, 192, Random(5))
    masked = seen != text
    assert masked.sum() == 64
    filled = infill(pipe, seen)
    assert torch.equal(filled[~masked], text[~masked])
    assert (filled[masked] == text[masked]).float().mean() > 0.6
    chance = log_probs_of(pipe, torch.where(masked, seen, pipe.tokenizer.mask_token_id))
    assert chance.shape == (192, len(pipe.tokenizer))


def test_muon_turns_a_gradient_into_a_rotation_of_the_size_of_adam():
    matrix = torch.nn.Parameter(torch.zeros(8, 24))
    optimizer = Muon([matrix], lr=1.0, momentum=0.0, weight_decay=0.0)
    matrix.grad = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals(matrix.detach()) / (0.2 * 24**0.5)
    assert ((values > 0.6) & (values < 1.3)).all()
    assert (matrix * matrix.grad).sum() < 0


def test_training_from_nothing_goes_on_and_writes_a_folder_that_loads(
    tmp_path, monkeypatch, one_short_level
):
    out = tmp_path / "model"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="goes on"):
        patched.setattr(train, "climb", interrupted)
        train.main(["--out", str(out), "--cpu-seconds", "100"])
    assert [p.name for p in tmp_path.iterdir()] == ["model.checkpoint"]
    counts = torch.load(tmp_path / "model.checkpoint", weights_only=True)["counts"]
    assert counts[:2] == (1, 128)
    train.main(["--out", str(out), "--cpu-seconds", str(counts[2] + 0.01), "--save-every", "0"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    trained = load_pipeline(out).model
    assert not torch.equal(trained.lm_head.weight, new_model(0).lm_head.weight.bfloat16().float())


def test_an_interrupted_write_keeps_the_old_folder(tmp_path, monkeypatch, pipe):
    out = tmp_path / "model"
    out.mkdir()
    (out / "README.md").write_text("card")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe.tokenizer), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pipeline(pipe.model, out)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "README.md"]


def test_measuring_prints_a_row_for_each_way_and_filled_texts(capsys):
    threads = torch.get_num_threads()
    measure.main([str(MODEL), "--sizes", "192:1", "--ways", "exact", "--show", "1"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("|")]
    assert [row[2] for row in rows if len(row) > 3] == ["way", "stock", "exact"]
    assert [line.split(":")[0] for line in lines if line and line[0] != "|"] == [
        *("masked", "filled", "true")
    ]
