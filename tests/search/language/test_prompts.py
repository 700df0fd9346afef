"""The search on prompts with videos: rows of each modality make a choice of their own."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

import sparse_dit
from sparse_dit import cli
from sparse_dit.patterns import Budget, ByQuery, Grid, Pattern, SinkWindow, VerticalSlash
from sparse_dit.plan import Plan
from sparse_dit.search.language import engine, scores
from sparse_dit.search.language.candidates import DENSE, by_modality, candidates
from sparse_dit.search.language.costs import Costs
from sparse_dit.search.language.items import Item
from sparse_dit.search.language.prompts import read_prompt
from tests.helpers.tiny_language_models import END, START, VIDEO, text, tokenizer, tokens, vision

transformers.logging.set_verbosity_error()
SMALL = Budget(beta=0.1, least=16)
FRAMES, SIDE = 6, 6  # tokens of a video: 6 frames of 6 x 6


def prompt(before, after):
    """A video between texts, as a processor makes it; its patches are 4 x 4 pixels, four to a token."""
    ids = tokens((None, before), (START, 1), (VIDEO, FRAMES * SIDE * SIDE), (END, 1), (None, after))
    pixels = torch.randn(FRAMES * 4 * SIDE * SIDE, 3 * 2 * 4 * 4)
    grid = torch.tensor([[FRAMES, 2 * SIDE, 2 * SIDE]])
    types = (ids == VIDEO).int() * 2
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types,
        "pixel_values_videos": pixels, "video_grid_thw": grid,
    }  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return vision("qwen2_5_vl")[0]


def few(media):
    assert media
    patterns = [
        Pattern(SinkWindow(sinks=4, budget=SMALL)),
        Pattern(VerticalSlash(budget=SMALL, sampled=8, sinks=4, local=16)),
        Pattern(Grid(budget=SMALL, sampled=8, sinks=4, local=16)),
    ]
    names = ("text", "image", "video")
    return (DENSE, *(by_modality(dict.fromkeys(names, pattern)) for pattern in patterns))


def test_a_prompt_is_compared_after_its_video(model):
    inputs = prompt(20, 30)
    read = read_prompt(model, inputs)
    assert "attention_mask" not in read.others and "pixel_values_videos" in read.others
    end = 20 + 1 + FRAMES * SIDE * SIDE
    assert read.positions.tolist() == list(range(end - 1, inputs["input_ids"].shape[1] - 1))
    item = Item.of_text(read, 16, 0, 1.0)
    assert set(item.of) == {"text", "video"} and len(item.rows) == 32
    assert item.weights[item.of["video"]].sum() == pytest.approx(FRAMES * SIDE * SIDE)
    kinds = read.modalities.kinds()[item.rows]
    assert (kinds[item.of["text"]] == 0).all() and (kinds[item.of["video"]] == 2).all()


def test_a_plan_is_found_for_the_rows_of_each_modality(model, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "candidates", few)
    # of so few tokens no time can be won
    monkeypatch.setattr(engine, "break_even", lambda *_: 0)
    monkeypatch.setattr(scores, "costs_of", lambda call, _: Costs(1.0, [1.0, 0.3, 0.4, 0.5], call))
    torch.manual_seed(1)
    prompts = [prompt(30, 60), prompt(20, 40)]
    plan = sparse_dit.search(model, prompts, max_kl=0.05, rows=16)
    heads = [h.pattern for stages in plan.components["model"].layers.values() for h in stages[0]]
    assert any(isinstance(pattern.shape, ByQuery) for pattern in heads)
    assert plan.measured["met"] and plan.density < 1
    plan.save(tmp_path / "plan.json")
    with sparse_dit.patch(model, Plan.load(tmp_path / "plan.json")) as handle, torch.no_grad():
        model(**prompts[1])
    summary = handle.summary()
    assert summary.sparse_calls == 2
    assert summary.density == pytest.approx(plan.density, rel=0.3)


def test_shapes_are_put_together_by_modality():
    patterns = few(True)
    joined = by_modality({"text": patterns[1], "video": patterns[3]}).shape
    assert isinstance(joined.text, SinkWindow) and isinstance(joined.video, Grid)
    assert joined.image == joined.video
    assert by_modality({"text": DENSE, "video": DENSE}) == DENSE
    assert by_modality({"text": DENSE, "image": patterns[3]}).shape.video == patterns[3].shape.image
    plain, seeing = candidates(), candidates(media=True)
    assert len(seeing) > len(plain) and seeing[0] == plain[0] == DENSE
    assert all(isinstance(pattern.shape, ByQuery) for pattern in seeing[1:])


def test_prompts_that_do_not_do(model):
    whole = prompt(10, 10)
    with pytest.raises(ValueError, match="one of a batch, without padding"):
        read_prompt(model, {**whole, "attention_mask": torch.zeros_like(whole["input_ids"])})
    with pytest.raises(ValueError, match="must have an image or a video"):
        read_prompt(model, {"input_ids": tokens((None, 300))})
    with pytest.raises(ValueError, match="must have an image or a video"):
        read_prompt(*text("llama", 1, 300))
    with pytest.raises(ValueError, match="needs text after its image or video"):
        short = prompt(10, 0)
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        read_prompt(model, short | {name: short[name][:, :-1] for name in names})


def test_commands_read_prompts_from_files(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(engine, "candidates", few)
    monkeypatch.setattr(engine, "break_even", lambda *_: 0)
    monkeypatch.setattr(scores, "costs_of", lambda call, _: Costs(1.0, [1.0, 0.3, 0.4, 0.5], call))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("vlm")
    tokenizer().save_pretrained("vlm")
    torch.manual_seed(1)
    for name, one in (("one", prompt(30, 60)), ("two", prompt(20, 40))):
        save_file(one, f"{name}.safetensors")
    save_file({"pixels": torch.ones(2)}, "pixels.safetensors")
    asked = ["--held-out-text", "two.safetensors", "--max-kl", "0.05"]
    assert cli.run(["search", "vlm", "--text", "pixels.safetensors", *asked]) == 2
    assert "must hold what a VLM's processor makes" in capsys.readouterr().err
    assert cli.run(["search", "vlm", "--text", "one.safetensors", *asked]) == 0
    plan = Plan.load("plan.json")
    assert plan.measured["met"] and 0 < plan.measured["agreement"] <= 1
    assert cli.run(["show", "plan.json", "--pick", "kl=9", "--out", "fast.json"]) == 0
    fast = Plan.load("fast.json").components["model"]
    assert any(
        isinstance(h.pattern.shape, ByQuery) for (heads,) in fast.layers.values() for h in heads
    )
    rules = ["--method", "mminference", "--method", "blindsight", "--density", "0.5"]
    read = [
        "--model",
        "vlm",
        "--text",
        "two.safetensors",
        "--plan",
        "plan.json",
        "--json",
        "rows.json",
    ]
    assert cli.run(["eval", "frontier", *read, *rules]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"plan", "mminference", "blindsight"}
    assert all(row["asked"] == 0 and 0 < row["agreement"] <= 1 for row in rows)
    assert (
        cli.run(["eval", "vlm", "plan.json", "--text", "two.safetensors", "--out", "report"]) == 0
    )
    assert "questions" not in capsys.readouterr().out
