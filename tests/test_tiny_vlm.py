"""The embedded video VLM: its weights, its drawn clips, and the script that trains it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoTokenizer

import sparse_dit
from demos.tiny_vlm import measure, prompts, train
from demos.tiny_vlm.clips import Clips, draw_clips
from demos.tiny_vlm.folder import new_model, write_model
from demos.tiny_vlm.inputs import to_patches
from demos.tiny_vlm.measure import Size, ask, ask_all, chance, load, uniform_plan
from demos.tiny_vlm.questions import LISTS, QUESTIONS, tokens, words
from sparse_dit.patterns import Budget, Pattern, SinkWindow, VerticalSlash
from tests.helpers.language_plans import plan_for

MODEL = Path(__file__).parents[1] / "demos" / "tiny_vlm" / "model"
SHORT = Size(pictures=16, side=4, clips=16)  # 256 video tokens
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model():
    return load(MODEL)


def drawn(*size, seed=0):
    return draw_clips(*size, torch.Generator().manual_seed(seed))


def test_drawing_follows_the_seed():
    one, again, other = drawn(2, 3, 4), drawn(2, 3, 4), drawn(2, 3, 4, seed=1)
    assert one.pixels.shape == (2, 3, 2, 3, 32, 32)
    assert one.pixels.quantile(0.01) >= 0 and one.pixels.max() <= 1
    assert torch.equal(one.pixels, again.pixels) and torch.equal(one.framed, again.framed)
    assert not torch.equal(one.pixels, other.pixels)


def test_one_picture_has_a_white_border():
    clips = drawn(6, 5, 2)
    white = (clips.pixels[..., 0, :] == 1).all(-1).all(-1).all(-1)  # [B, T]
    assert torch.equal(white.int().argmax(1), clips.framed) and (white.sum(1) == 1).all()


@pytest.mark.parametrize("side", [2, 8])
def test_shapes_move_one_step_inside_the_picture(side):
    clips = drawn(4, 16, side)
    black = (clips.pixels == 0).all(3) & (clips.colour == 7)[:, :, None, None, None]
    place = torch.arange(black.shape[-1]) + 0.5
    seen = black.flatten(0, 1)[(clips.colour == 7).flatten()].float()  # [pictures, 2, S, S]
    mass = seen.sum((2, 3))
    rows = (seen.sum(3) * place).sum(2) / mass
    columns = (seen.sum(2) * place).sum(2) / mass
    moved = torch.stack([rows[:, 1] - rows[:, 0], columns[:, 1] - columns[:, 0]], 1)
    ways = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]])[clips.motion[clips.colour == 7]]
    assert len(moved) > 3 and (moved - 3 * ways).abs().max() < 0.7


def test_every_word_is_one_token():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.get_vocab() == {word: number for number, word in enumerate(words())}
    assert tokenizer("colour ? red").input_ids == tokens(("colour", "?", "red")).tolist()
    assert len(words()) <= new_model(0).config.text_config.vocab_size


def test_answers_and_lists_say_what_was_drawn():
    clips = drawn(8, 6, 2)
    said = {
        kind: [known[i] for i in right(clips).tolist()]
        for kind, (known, right) in QUESTIONS.items()
    }
    listed = {kind: right(clips) for kind, (_, right) in LISTS.items()}
    for b, framed in enumerate(clips.framed.tolist()):
        assert said["number"][b] == str(framed) and listed["frames"][b].tolist() == [
            int(t == framed) for t in range(6)
        ]
        assert said["colour"][b] == LISTS["colours"][0][listed["colours"][b, framed]]
        after = LISTS["colours"][0][clips.colour[b, framed + 1]] if framed < 5 else "end"
        assert said["next"][b] == after


def test_patches_are_those_of_transformers():
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    plain = {f"do_{word}": False for word in ("resize", "rescale", "normalize", "convert_rgb")}
    processor = pil.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, **plain
    )
    picture = torch.rand(3, 16, 24)
    want = processor([picture.numpy()], input_data_format="channels_first", return_tensors="pt")
    got = to_patches((picture[None, None, None].expand(1, 1, 2, -1, -1, -1) + 1) / 2)
    torch.testing.assert_close(got, want["pixel_values"])


def test_the_folder_is_small(model):
    assert sum(f.stat().st_size for f in MODEL.iterdir()) < 3e6
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"


def test_it_answers_and_so_does_exact_attention(model):
    other = load(MODEL)
    with sparse_dit.patch(other, "exact") as handle:
        found = ask_all({"stock": model, "exact": other}, SHORT)
    assert handle.summary().sparse_calls == 4 * len(QUESTIONS) * SHORT.clips
    for kind in QUESTIONS:
        assert found["stock"].accuracy(kind) > chance(kind, SHORT.pictures) + 0.2, kind
    assert found["stock"].right == found["exact"].right
    for kind, values in found["stock"].log_prob.items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(found["exact"].log_prob[kind]), atol=1e-4, rtol=1e-4
        )


def test_a_vertical_slash_plan_runs_sparse_and_answers_where_a_window_as_large_fails(model):
    size, budget = replace(SHORT, clips=8), Budget(beta=0.4, least=16)
    slash = Pattern(VerticalSlash(budget=budget, sampled=8, sinks=4, local=16))
    window = Pattern(SinkWindow(sinks=4, budget=budget))
    other, near = load(MODEL), load(MODEL)
    with (
        sparse_dit.patch(other, plan_for(other, slash)) as handle,
        sparse_dit.patch(near, uniform_plan(near, window)) as nearby,
    ):
        found = ask_all({"stock": model, "slash": other, "window": near}, size)
    for summary in (handle.summary(), nearby.summary()):
        assert summary.sparse_calls == 4 * len(QUESTIONS) * size.clips
        assert summary.dense_calls == 0 and 0.4 < summary.density < 0.7
    for kind in ("colour", "motion"):
        right = {way: answers.accuracy(kind) for way, answers in found.items()}
        assert right["slash"] >= right["stock"] - 0.13 and right["slash"] > right["window"] + 0.2


def test_a_question_is_answered_alike_alone_and_in_a_batch(model):
    clips = drawn(3, 4, 2)
    together, right = ask(model, clips, "shape")
    for b in range(3):
        alone = Clips(**{name: value[b : b + 1] for name, value in vars(clips).items()})
        log_probs, answer = ask(model, alone, "shape")
        torch.testing.assert_close(log_probs[0], together[b], atol=1e-4, rtol=1e-4)
        assert answer == right[b]


def test_training_from_nothing_goes_on_and_writes_a_folder_that_loads(tmp_path, monkeypatch):
    out = tmp_path / "model"
    threads = torch.get_num_threads()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="goes on"):
        patched.setattr(train, "climb", interrupted)
        train.main(["--out", str(out), "--cpu-seconds", "100"])
    assert [p.name for p in tmp_path.iterdir()] == ["model.checkpoint"]
    kept = torch.load(tmp_path / "model.checkpoint", weights_only=True)
    assert kept["counts"][0] == 1
    train.main(
        ["--out", str(out), "--cpu-seconds", str(kept["counts"][1] + 0.01), "--save-every", "0"]
    )
    torch.set_num_threads(threads)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    trained = load(out)
    assert not torch.equal(trained.lm_head.weight, new_model(0).lm_head.weight.bfloat16().float())


def test_an_interrupted_write_keeps_the_old_folder(tmp_path, monkeypatch, model):
    out = tmp_path / "model"
    out.mkdir()
    (out / "README.md").write_text("card")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_model(model, out)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "README.md"]


def test_measuring_prints_a_row_for_each_way(capsys):
    threads = torch.get_num_threads()
    ways = ["exact", "vertical_slash:0.1"]
    measure.main([str(MODEL), "--sizes", "4x2:1", "--ways", *ways])
    torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows if len(row) > 3] == ["way", "chance", "stock", *ways]


def test_prompts_for_commands_hold_the_question_and_its_answer(tmp_path, model):
    prompts.main([str(tmp_path / "prompts"), "--size", "4x2:1"])
    files = sorted((tmp_path / "prompts").iterdir())
    assert [file.stem for file in files] == sorted(f"0-{kind}" for kind in QUESTIONS)
    inputs = load_file(tmp_path / "prompts" / "0-colour.safetensors")
    (clips,) = measure.clips_of(Size(4, 2, 1))
    known, right = QUESTIONS["colour"]
    assert (
        inputs["input_ids"][0, -3:].tolist()
        == tokens(("colour", "?", known[right(clips)])).tolist()
    )
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
