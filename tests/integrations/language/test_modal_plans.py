"""VLMs under plans whose heads see by modality: what runs is what their index names, in parts and batches."""

import pytest
import torch
import transformers

import sparse_dit
from sparse_dit.estimate import Budget, ByKey, ByQuery, Dense, Grid, OwnPart
from sparse_dit.integrations import attach
from sparse_dit.patterns import Pattern
from sparse_dit.plan import Plan
from sparse_dit.runtime import Runtime
from tests.helpers.language_plans import NEAR, SLASH, plan_for, run_beside_reference
from tests.helpers.tiny_language_models import IMAGE, START, VIDEO, logits, tokens, vision

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

LINES = Grid(budget=Budget(beta=0.2, least=32), sampled=16, sinks=4)
BY_QUERY = Pattern(ByQuery(text=SLASH.shape, image=OwnPart(sinks=8), video=LINES))
BY_PAIR = Pattern(
    ByQuery(
        text=ByKey(text=SLASH.shape, image=NEAR.shape, video=LINES),
        image=OwnPart(),
        video=ByKey(text=NEAR.shape, image=NEAR.shape, video=LINES),
    )
)


def with_video(name, frames=8, height=12, width=16, text_after=150):
    """A prompt of a tiny Qwen-VL with a video that is most of it."""
    model, _ = vision(name)
    frame = height * width // 4
    if name == "qwen3_vl":
        parts = [((None, 3), (START, 1), (VIDEO, frame), (IMAGE + 3, 1)) for _ in range(frames)]
        ids = tokens((None, 30), *(run for part in parts for run in part), (None, text_after))
    else:
        ids = tokens((None, 30), (START, 1), (VIDEO, frames * frame), (None, text_after))
    return model, {
        "input_ids": ids,
        "pixel_values_videos": torch.randn(frames * height * width, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[frames, height, width]]),
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
    }


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("patterns", [(BY_QUERY,), (BY_PAIR, SLASH, Pattern(LINES), BY_QUERY)])
def test_a_plan_computes_what_its_index_names(name, patterns):
    model, inputs = with_video(name)
    runtime, calls, densities = run_beside_reference(model, inputs, plan_for(model, *patterns))
    assert len(densities) == 2 and all(0.02 < density < 0.8 for density in densities)
    assert runtime.notes == ()
    for call in calls:
        (where,) = call.context.modalities
        assert {part.kind for part in where.media} == {"video"} and where.unknown is None


def test_chunks_and_generation_follow_the_plan():
    model, inputs = with_video("qwen3_vl")
    model.generation_config.pad_token_id = 0
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    want = model.generate(**inputs, **how)
    shapes = set()

    def watch(call):
        shapes.add((call.q.shape[1], len(call.context.modalities[0].media)))
        return call.stock()

    attachment = attach(model, watch)
    assert torch.equal(model.generate(**inputs, **how, prefill_chunk_size=160), want)
    attachment.detach()
    assert (160, 3) in shapes and (1, 8) in shapes
    with sparse_dit.patch(model, plan_for(model, BY_QUERY)) as handle:
        model.generate(**inputs, **how, prefill_chunk_size=160)
    summary = handle.summary()
    assert summary.sparse_calls >= 8 and summary.density < 0.9 and summary.notes == ()
    assert torch.equal(model.generate(**inputs, **how), want)


def two_prompts():
    model, one = with_video("qwen2_5_vl", text_after=100)
    _, two = with_video("qwen2_5_vl", frames=4, text_after=100 + 4 * 48)
    return model, one, two


def test_prompts_that_differ_are_as_if_alone():
    model, one, two = two_prompts()
    both = {name: torch.cat([one[name], two[name]]) for name in one}
    both["second_per_grid_ts"] = torch.ones(2)
    with sparse_dit.patch(model, plan_for(model, BY_QUERY)) as handle:
        alone = [
            logits(model, {**inputs, "second_per_grid_ts": torch.ones(1)}) for inputs in (one, two)
        ]
        got = logits(model, both)
    assert handle.summary().sparse_calls == 2 * 4, "each prompt is a call of its own"
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_prompts_that_differ_behind_padding():
    model, one, two = two_prompts()
    shorter = {name: two[name][:, :-40] for name in ("input_ids", "mm_token_type_ids")}
    two = {**two, **shorter}
    length = one["input_ids"].shape[1]
    both, mask = {}, torch.ones(2, length, dtype=torch.long)
    mask[1, :40] = 0
    for name in one:
        pad = (40, 0) if name in ("input_ids", "mm_token_type_ids") else (0, 0)
        last = torch.nn.functional.pad(two[name], pad) if pad[0] else two[name]
        both[name] = torch.cat([one[name], last])
    plan = plan_for(model, Pattern(ByQuery(text=NEAR.shape, video=OwnPart(sinks=4))))
    with sparse_dit.patch(model, plan) as handle:
        got = logits(model, {**both, "attention_mask": mask, "second_per_grid_ts": torch.ones(2)})
    assert handle.summary().sparse_calls == 4 and got.isfinite().all()
    with sparse_dit.patch(model, plan):
        want = logits(model, {**one, "second_per_grid_ts": torch.ones(1)})
    torch.testing.assert_close(got[:1], want, rtol=1e-4, atol=1e-4)


def test_images_that_are_not_known_are_told_of(caplog):
    model, inputs = with_video("qwen2_5_vl")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    plan = plan_for(model, BY_QUERY)
    with sparse_dit.patch(model, plan) as handle:
        logits(model, {"inputs_embeds": embeds})
        logits(model, {"inputs_embeds": embeds})
    (note,) = handle.summary().notes
    assert note == (
        "images are taken for text: the prompt came as inputs_embeds, which don't tell where images lie"
    )
    assert note in str(handle.summary()).replace("\n", " ") and caplog.text.count(note) == 1
    assert handle.summary().sparse_calls == 4
    with sparse_dit.patch(model, plan_for(model, SLASH)) as handle:
        logits(model, {"inputs_embeds": embeds})
    assert handle.summary().notes == (), "this plan asks for no images"


def test_images_whose_rows_see_one_another_are_exact():
    """Gemma 3's full layers: everything before, and an image whole, is what stock computes."""
    model, inputs = vision("gemma3")
    all_before = Pattern(ByQuery(text=Dense(), image=OwnPart(sinks=1 << 19)))
    want = logits(model, inputs)
    layer = "model.language_model.layers.1.self_attn"
    plan = plan_for(model, all_before)
    part = plan.components["model"]
    runtime = Runtime("model", part, "auto")
    attachment = attach(model, lambda call: runtime(call) if call.layer == layer else call.stock())
    torch.testing.assert_close(logits(model, inputs), want, rtol=1e-4, atol=1e-5)
    attachment.detach()
    (ran,) = runtime.ran
    assert ran.dense_because is None and ran.layer == layer
    assert ran.pairs == 4 * (29 * 30 // 2 + 6), "the mask lets 4 tokens see one another"


def test_a_plan_with_modalities_is_kept_in_a_file(tmp_path):
    model, inputs = with_video("qwen2_5_vl")
    plan = plan_for(model, BY_PAIR, Pattern(LINES), Pattern(OwnPart()))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with sparse_dit.patch(model, plan):
        want = logits(model, inputs)
    with sparse_dit.patch(model, tmp_path / "plan.json") as handle:
        assert torch.equal(logits(model, inputs), want)
    assert handle.summary().sparse_calls == 2
    text = {"input_ids": torch.randint(5, 100, (1, 300))}
    with sparse_dit.patch(model, plan) as handle:
        logits(model, text)
    assert handle.summary().sparse_calls == 2 and handle.summary().notes == ()
