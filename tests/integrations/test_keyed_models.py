"""Models that pack a prompt with what they make: keys that are no queries, padding, several sizes."""

import functools
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

from sparse_dit.index import SparseIndex
from sparse_dit.integrations.arrangement import Arrangement
from sparse_dit.integrations.diffusers import (
    attach,
    components,
    output_projection,
    self_attention_layers,
)
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patch import patch
from tests.helpers import tiny_image_transformers as images
from tests.helpers.tiny_keyed_models import cosmos3, qwen21
from tests.helpers.tiny_pipelines import generate
from tests.integrations.test_video_models import NARROW, WIDE, Recorder, drift, plan_for

IMAGE = Segment.grid(1, 4, 6)


def run(transformer, inputs):
    """The first output, of a video model its last."""
    with torch.no_grad():
        out = transformer(return_dict=False, **inputs)[0]
    return out[-1] if isinstance(out, list) else out


def calls_of(transformer, inputs):
    recorder = Recorder()
    attachment = attach(transformer, recorder)
    out = run(transformer, inputs)
    attachment.detach()
    return out, recorder.calls


def compared(transformer, inputs, stock, reasons, run=run):
    """Dense is bit-equal, sparse differs, a window over all is stock, and stock is back afterwards."""
    out, _ = calls_of(transformer, inputs) if run is globals()["run"] else (stock, None)
    assert torch.equal(out, stock)
    for pattern in (NARROW, WIDE):
        with patch(transformer, plan_for(transformer, pattern)) as handle:
            out = run(transformer, inputs)
        assert {r.dense_because for r in handle.ran["transformer"]} == {None, *reasons}
        sparse = [r for r in handle.ran["transformer"] if r.dense_because is None]
        assert {r.layer for r in sparse} == set(self_attention_layers(transformer))
        if pattern is WIDE:
            torch.testing.assert_close(out, stock, rtol=2e-4, atol=2e-4)
        else:
            assert 0 < drift(out, stock) < 0.5
        assert torch.equal(run(transformer, inputs), stock)


def test_queries_that_are_missing_are_zeros_and_their_outputs_are_dropped():
    q, k = torch.randn(2, 4, 3, 5), torch.randn(2, 7, 3, 5)
    layout = TokenLayout.video(1, 2, 2, text_before=2, text_after=1)
    found = Arrangement(layout, only_keys=(2, 1))
    wide = found.arrange_queries(q)
    assert wide.shape == k.shape and torch.equal(wide[:, 2:6], q)
    assert not wide[:, :2].any() and not wide[:, 6:].any()
    assert torch.equal(found.restore(wide), q)
    assert found.arrange(k) is k and found.widens(q, k) and found.fits(q)
    assert not found.widens(k, k) and not found.fits(k) and not found.widens(q[:, :3], k)
    turned = replace(found, order=torch.arange(7).flip(0).expand(2, -1))
    assert torch.equal(turned.restore(turned.arrange_queries(q)), q)
    assert turned.fits(q) and not turned.fits(q[:1])


def test_qwen_image_21_makes_its_image_of_a_prompt_that_does_not_see_it(monkeypatch):
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    transformer, inputs = qwen21()
    stock = run(transformer, inputs)
    _, calls = calls_of(transformer, inputs)
    mine = [c for c in calls if c.unsupported is None]
    assert len(mine) == 2 and {c.context.sigma for c in mine} == {0.25}
    assert {c.context.layout for c in mine} == {TokenLayout((IMAGE, Segment.global_(7)))}
    assert {tuple(c.kv_len.tolist()) for c in mine} == {(31, 28)}
    reason = "the host asked for a mask of other tokens than the forward's"
    compared(transformer, inputs, stock, {reason})


def test_qwen_image_21_with_cached_keys_of_its_prompt(monkeypatch):
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    transformer, inputs = qwen21()

    def second(transformer, inputs):
        cache = QwenImage21KVCache(2)
        run(transformer, {**inputs, "kv_cache": cache, "kv_cache_mode": "extract"})
        return run(transformer, {**inputs, "kv_cache": cache, "kv_cache_mode": "cached"})

    stock = second(transformer, inputs)
    torch.testing.assert_close(stock, run(transformer, inputs)[:, 7:], rtol=1e-4, atol=1e-4)
    reason = "the host asked for a mask of other tokens than the forward's"
    compared(transformer, inputs, stock, {reason}, second)


def test_an_edited_image_of_qwen_image_21_comes_before_the_image():
    transformer, inputs = qwen21()
    slots = torch.zeros(2, 9 + 6, dtype=torch.bool)
    slots[:, 3:5] = slots[:, 9:] = True  # 8 tokens of an image among 7 of text
    inputs |= {
        "hidden_states": torch.randn(2, 8 + 24, 16),
        "encoder_hidden_states": torch.randn(2, 9, 32),
        "encoder_hidden_states_mask": torch.ones(2, 9, dtype=torch.bool),
        "img_shapes": [[(1, 2, 4), (1, 4, 6)]] * 2,
        "img_mask": slots,
    }
    stock = run(transformer, inputs)
    out, calls = calls_of(transformer, inputs)
    assert torch.equal(out, stock)
    layouts = {c.context.layout for c in calls if c.unsupported is None}
    assert layouts == {TokenLayout((Segment.global_(7 + 8), IMAGE))}


def test_cosmos_3_sees_a_prompt_that_does_not_see_it(monkeypatch):
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    transformer, inputs = cosmos3()
    stock = run(transformer, inputs)
    _, calls = calls_of(transformer, inputs)
    mine = [c for c in calls if c.unsupported is None]
    assert [c.layer for c in mine] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert {c.context.layout for c in mine} == {
        TokenLayout.video(3, 4, 6, text_before=13, text_after=5)
    }
    assert {(c.context.sigma, c.q.shape[2], c.k.shape[2]) for c in mine} == {(0.25, 4, 2)}
    layer = self_attention_layers(transformer)["layers.0.self_attn"]
    assert output_projection(layer) is layer.to_add_out
    compared(transformer, inputs, stock, {"the host asked for a causal mask"})


def test_cosmos_3_without_noisy_frames_is_at_noise_level_0():
    transformer, inputs = cosmos3()
    inputs |= {
        "vision_noisy_frame_indexes": [torch.arange(0), torch.arange(0)],
        "vision_timesteps": torch.zeros(0),
        "vision_mse_loss_indexes": torch.arange(0),
    }
    _, calls = calls_of(transformer, inputs)
    assert {c.context.sigma for c in calls} == {0.0}
    layout = FAMILIES["Cosmos3OmniTransformer"].layout
    torn = inputs["vision_sequence_indexes"].flip(0)
    assert layout(transformer.config, {**inputs, "vision_sequence_indexes": torn}) is None
    assert layout(transformer.config, {**inputs, "vision_token_shapes": []}) is None


def test_padding_of_ideogram_before_its_text(monkeypatch):
    """What its rows of padding are no one reads."""
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    transformer, inputs = images.ideogram((7, 4))
    stock = run(transformer, inputs)
    out, calls = calls_of(transformer, inputs)
    assert torch.equal(out, stock)
    assert {c.context.layout for c in calls} == {TokenLayout((IMAGE, Segment.global_(7)))}
    assert {tuple(c.kv_len.tolist()) for c in calls} == {(31, 28)}
    with patch(transformer, plan_for(transformer, WIDE)) as handle:
        out = run(transformer, inputs)
    assert {r.dense_because for r in handle.ran["transformer"]} == {None}
    torch.testing.assert_close(out[:, 7:], stock[:, 7:], rtol=2e-4, atol=2e-4)


def test_an_image_of_ideogram_without_a_prompt_and_sequences_that_are_none():
    _, inputs = images.ideogram()
    layout = functools.partial(FAMILIES["Ideogram4Transformer2DModel"].layout, None)
    alone = {
        k: v[:, 7:] for k, v in inputs.items() if k in ("position_ids", "segment_ids", "indicator")
    }
    assert layout(alone) == TokenLayout((IMAGE,))
    text_last = inputs["indicator"].roll(1, 1)
    assert layout({**inputs, "indicator": text_last}) is None
    two = inputs["segment_ids"].clone()
    two[:, 20:] = 2
    assert layout({**inputs, "segment_ids": two}) is None
    turned = inputs["position_ids"].clone()
    turned[1, 7:] = turned[1, 7:].flip(0)
    assert layout({**inputs, "position_ids": turned}) is None


@pytest.mark.parametrize("name", ["prx", "nucleus"])
def test_a_prompt_without_a_mask_is_not_moved(name):
    transformer, inputs = images.BUILDERS[name]()
    inputs = {key: value for key, value in inputs.items() if "mask" not in key}
    stock = run(transformer, inputs)
    out, calls = calls_of(transformer, inputs)
    text = Segment.global_(7)
    parts = (text, IMAGE) if name == "prx" else (IMAGE, text)
    assert torch.equal(out, stock) and {c.context.layout for c in calls} == {TokenLayout(parts)}
    assert {c.kv_len for c in calls} == {None}


def test_images_of_several_sizes_in_a_batch_give_no_layout():
    layout = FAMILIES["NucleusMoEImageTransformer2DModel"].layout
    text = torch.zeros(2, 7, 32)
    for shapes, found in (([(1, 4, 6), (1, 6, 4)], None), ((1, 4, 6), IMAGE)):
        given = layout(None, {"img_shapes": shapes, "encoder_hidden_states": text})
        assert given is found or given.segments[0] == found
    _, inputs = images.joyimage_plus()
    layout = FAMILIES["JoyImageEditPlusTransformer3DModel"].layout
    assert layout(None, inputs) == TokenLayout((IMAGE, Segment.global_(7)))
    shapes = [inputs["shape_list"][0], [(1, 6, 4), (1, 1, 1)]]
    assert layout(None, {**inputs, "shape_list": shapes}) is None


def test_gists_of_bria_fibo_2_come_first_where_none_is_padded():
    transformer, inputs = images.bria_fibo2((7, 7))
    inputs["context_latents"] = [torch.randn(2, 4, 4, 6)]
    stock = run(transformer, inputs)
    out, calls = calls_of(transformer, inputs)
    assert torch.equal(out, stock)
    layout = TokenLayout((Segment.global_(7), IMAGE, Segment.global_(6)))
    assert {c.context.layout for c in calls} == {layout}
    _, calls = calls_of(transformer, {**inputs, "encoder_attention_mask": None})
    assert {c.context.layout for c in calls} == {layout}


def test_ideogram_with_a_transformer_of_its_own_for_no_prompt():
    """Both run in every step, each by its own part of the plan."""
    parts = [images.ideogram((7,))[0] for _ in range(2)]
    pipe = diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=parts[0],
        unconditional_transformer=parts[1],
    )
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 7 + 96, 32, generator=torch.Generator().manual_seed(1))
    packed = pipe._prepare_ids([5], 8, 12, 7, torch.device("cpu"))
    pipe.encode_prompt = lambda **options: (text, *packed)
    call = {"prompt": "a cat", "height": 128, "width": 192, "max_sequence_length": 7}
    call |= {"num_inference_steps": 3, "guidance_scale": 3.0, "guidance_schedule": None}
    call["output_type"] = "latent"
    stock = generate(pipe, call)
    plan = plan_for(parts[0], NARROW)
    both = dict.fromkeys(sorted(components(pipe)), plan.components["transformer"])
    assert list(both) == ["transformer", "unconditional_transformer"]
    with patch(pipe, replace(plan, components=both)) as handle:
        sparse = generate(pipe, call)
        first, second = (a.context for a in handle._attachments.values())
    assert (first.run, first.step, second.run, second.step) == (0, 2, 0, 2)
    assert first.sigma == second.sigma
    assert first.layout == TokenLayout.video(1, 8, 12, text_after=7)
    assert second.layout == TokenLayout.video(1, 8, 12)
    for ran in handle.ran.values():
        assert {(r.dense_because, r.calls) for r in ran} == {(None, 3)}
    assert 0 < drift(sparse, stock) < 0.5
    assert torch.equal(generate(pipe, call), stock)
