import copy
import filecmp
import functools
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

from sparse_dit.call import StepContext
from sparse_dit.integrations import processors
from sparse_dit.integrations.diffusers import (
    attach,
    attachment_of,
    components,
    self_attention_layers,
)
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.layout import TokenLayout
from tests.helpers.tiny_pipelines import BUILDERS, generate, wan

FAMILY = pytest.mark.parametrize("family", BUILDERS)


@functools.cache
def _built(family):
    pipe, call = BUILDERS[family]()
    return pipe, call, generate(pipe, call)


@pytest.fixture
def tiny(family):
    """`(pipe, call, stock latents)`, and the check that the test left nothing behind."""
    pipe, call, stock = _built(family)
    before = {n: m.processor for n, m in self_attention_layers(pipe.transformer).items()}
    yield pipe, call, stock
    assert attachment_of(pipe.transformer) is None
    assert "cache_context" not in vars(pipe.transformer)
    assert not pipe.transformer._forward_pre_hooks
    for name, layer in self_attention_layers(pipe.transformer).items():
        assert layer.processor is before[name]


class Recorder:
    """An intercept that changes nothing and keeps what it saw."""

    def __init__(self):
        self.calls = []

    def __call__(self, call):
        self.calls.append(call)
        return call.stock()


def stock_only(call):
    return call.stock()


def halve(call):
    return call.stock() * 0.5


LAYERS = {
    "wan": ["blocks.0.attn1", "blocks.1.attn1"],
    "cogvideox": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "hunyuan_video": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
    "ltx": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "flux": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
}
LAYOUT = {
    "wan": TokenLayout.video(5, 4, 4),
    "cogvideox": TokenLayout.video(3, 4, 4, text_before=16),
    "hunyuan_video": TokenLayout.video(3, 4, 4, text_after=16),
    "ltx": TokenLayout.video(3, 8, 8),
    "flux": TokenLayout.video(1, 16, 16, text_before=48),
}
# (branch, step, timestep out of 1000) of the forwards of a two-step run, from the schedulers' tables
FORWARDS = {
    "wan": [("cond", 0, 1000), ("uncond", 0, 1000), ("cond", 1, 8.9286), ("uncond", 1, 8.9286)],
    "cogvideox": [("any", 0, 500), ("any", 1, 0)],
    "hunyuan_video": [("cond", 0, 1000), ("cond", 1, 875)],
    "ltx": [("any", 0, 1000), ("any", 1, 500)],
    "flux": [("cond", 0, 1000), ("cond", 1, 500)],
}


def test_every_tiny_pipeline_is_of_a_known_family():
    built = {type(_built(family)[0].transformer).__name__ for family in BUILDERS}
    assert built <= set(FAMILIES)


@FAMILY
def test_dense_through_the_seam_is_bit_equal_twice_and_removal_restores_the_objects(family, tiny):
    pipe, call, stock = tiny
    stock_processors = [m.processor for m in self_attention_layers(pipe.transformer).values()]
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    assert torch.equal(generate(pipe, call), stock)
    assert torch.equal(generate(pipe, call), stock)
    assert len(recorder.calls) == 2 * len(FORWARDS[family]) * len(LAYERS[family])
    assert [c.context.run for c in recorder.calls] == sorted(c.context.run for c in recorder.calls)
    attachment.detach()
    attachment.detach()
    restored = [m.processor for m in self_attention_layers(pipe.transformer).values()]
    assert all(a is b for a, b in zip(restored, stock_processors, strict=True))
    assert torch.equal(generate(pipe, call), stock)


@FAMILY
def test_layers_layout_sigma_branch_run_and_step(family, tiny):
    pipe, call, _ = tiny
    assert list(self_attention_layers(pipe.transformer)) == LAYERS[family]
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    for run in range(2):
        recorder.calls.clear()
        generate(pipe, call, seed=run)
        seen = [c for c in recorder.calls if c.layer == LAYERS[family][0]]
        assert [c.layer for c in recorder.calls] == LAYERS[family] * len(FORWARDS[family])
        for c, (branch, step, timestep) in zip(seen, FORWARDS[family], strict=True):
            assert c.context.layout == LAYOUT[family]
            assert c.context.sigma == pytest.approx(timestep / 1000, rel=1e-4)
            assert (c.context.branch, c.context.run, c.context.step) == (branch, run, step)
            assert c.q.shape[1] == c.k.shape[1] == LAYOUT[family].seq_len
            assert c.q.shape[2:] == (
                pipe.transformer.config.num_attention_heads,
                pipe.transformer.config.attention_head_dim,
            )
            assert c.unsupported is None
    assert attachment.context is recorder.calls[-1].context
    attachment.detach()


@pytest.mark.parametrize("family", ["hunyuan_video"])
def test_padded_text_becomes_kv_len_read_once_a_forward(family, tiny, monkeypatch):
    pipe, call, _ = tiny
    reads = []
    original = processors._valid_prefix
    monkeypatch.setattr(processors, "_valid_prefix", lambda *a: reads.append(a) or original(*a))
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    generate(pipe, call)
    assert len(reads) == len(FORWARDS[family])
    for c in recorder.calls:
        assert c.kv_len.tolist() == [int(c.attn_mask.sum())]
        assert 48 < c.kv_len.item() < 64
        valid = c.kv_len.item()
        q, k, v = (x.transpose(1, 2) for x in (c.q, c.k[:, :valid], c.v[:, :valid]))
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        torch.testing.assert_close(c.stock(), want)
    attachment.detach()


@FAMILY
def test_what_the_intercept_returns_is_what_the_layer_computes(family, tiny):
    pipe, call, stock = tiny
    attachment = attach(pipe.transformer, halve)
    changed = generate(pipe, call)
    attachment.detach()
    assert changed.isfinite().all()
    assert not torch.allclose(changed, stock)
    assert torch.equal(generate(pipe, call), stock)


@FAMILY
def test_a_deep_copy_stays_attached_with_its_own_weights_and_its_own_way_off(family, tiny):
    pipe, call, stock = tiny
    attachment = attach(pipe.transformer, halve)
    changed = generate(pipe, call)
    twin = copy.deepcopy(pipe)
    assert attachment_of(twin.transformer) not in (None, attachment)
    attachment.detach()
    assert torch.equal(generate(twin, call), changed)
    with torch.no_grad():
        for parameter in twin.transformer.parameters():
            parameter.mul_(0.9)
    assert not torch.equal(generate(twin, call), changed)
    assert torch.equal(generate(pipe, call), stock)
    attachment_of(twin.transformer).detach()
    assert attachment_of(twin.transformer) is None
    with torch.no_grad():
        for parameter, original in zip(
            twin.transformer.parameters(), pipe.transformer.parameters(), strict=True
        ):
            parameter.copy_(original)
    assert torch.equal(generate(twin, call), stock)


@FAMILY
def test_processors_and_transformers_pickle(family, tiny):
    pipe, call, stock = tiny
    attachment = attach(pipe.transformer, halve)
    changed = generate(pipe, call)
    processor = self_attention_layers(pipe.transformer)[LAYERS[family][0]].processor
    again = pickle.loads(pickle.dumps(processor))
    assert type(again) is type(processor)
    assert len(pickle.dumps(processor)) < 2000
    original, pipe.transformer = pipe.transformer, pickle.loads(pickle.dumps(pipe.transformer))
    try:
        assert torch.equal(generate(pipe, call), changed)
        attachment_of(pipe.transformer).detach()
        assert torch.equal(generate(pipe, call), stock)
    finally:
        pipe.transformer = original
        attachment.detach()


@FAMILY
def test_the_saved_folder_is_stock(family, tiny, tmp_path: Path):
    pipe, _, _ = tiny
    pipe.transformer.save_pretrained(tmp_path / "stock")
    attachment = attach(pipe.transformer, halve)
    pipe.transformer.save_pretrained(tmp_path / "attached")
    keys = set(pipe.transformer.state_dict())
    attachment.detach()
    assert keys == set(pipe.transformer.state_dict())
    names = sorted(p.name for p in (tmp_path / "stock").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "attached").iterdir())
    assert len(names) == 2
    assert filecmp.cmpfiles(tmp_path / "stock", tmp_path / "attached", names, shallow=False) == (
        names,
        [],
        [],
    )
    loaded = type(pipe.transformer).from_pretrained(tmp_path / "attached")
    assert attachment_of(loaded) is None


@FAMILY
def test_an_exception_inside_a_forward_leaves_no_trace(family, tiny):
    pipe, call, stock = tiny

    def fail_at_second_layer(c):
        if c.layer == LAYERS[family][1]:
            raise RuntimeError("in the middle")
        return c.stock()

    attachment = attach(pipe.transformer, fail_at_second_layer)
    with pytest.raises(RuntimeError, match="in the middle"):
        generate(pipe, call)
    assert processors._ACTIVE.seam is None
    attachment.detach()
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    assert torch.equal(generate(pipe, call), stock)
    assert recorder.calls[0].context.branch == FORWARDS[family][0][0]
    attachment.detach()
    assert torch.equal(generate(pipe, call), stock)


def test_a_failed_run_and_the_next_one_are_two_runs():
    pipe, call, _ = _built("wan")
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    hook = pipe.transformer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, call)
    hook.remove()
    generate(pipe, call)
    generate(pipe, call, num_inference_steps=1)
    generate(pipe, call, num_inference_steps=1, guidance_scale=1.0)
    attachment.detach()
    seen = [c.context for c in recorder.calls if c.layer == "blocks.0.attn1"]
    assert [(c.run, c.step, c.branch) for c in seen] == [
        (0, 0, "cond"),
        (1, 0, "cond"),
        (1, 0, "uncond"),
        (1, 1, "cond"),
        (1, 1, "uncond"),
        (2, 0, "cond"),
        (2, 0, "uncond"),
        (3, 0, "cond"),
    ]


@FAMILY
def test_signature_of_a_processor_is_the_hosts(family, tiny):
    pipe, _, _ = tiny
    layer = next(iter(self_attention_layers(pipe.transformer).values()))
    stock = inspect.signature(layer.processor.__call__)
    attachment = attach(pipe.transformer, stock_only)
    assert inspect.signature(layer.processor.__call__) == stock
    assert isinstance(layer.processor, type(attachment._stock[LAYERS[family][0]]))
    attachment.detach()


def test_attaching_twice_is_an_error():
    pipe, _, _ = _built("wan")
    attachment = attach(pipe.transformer, stock_only)
    with pytest.raises(ValueError, match=r"attached to this WanTransformer3DModel already"):
        attach(pipe.transformer, stock_only)
    attachment.detach()


def test_a_processor_without_a_known_attention_call_is_an_error_and_changes_nothing():
    pipe, _, _ = _built("wan")
    layer = pipe.transformer.blocks[1].attn1
    stock = layer.processor

    class Linear:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    layer.set_processor(Linear())
    with pytest.raises(TypeError, match="Linear calls no attention function that sparse_dit knows"):
        attach(pipe.transformer, stock_only)
    assert attachment_of(pipe.transformer) is None
    assert type(pipe.transformer.blocks[0].attn1.processor) is type(stock)
    layer.set_processor(stock)


def test_components_name_what_is_supported():
    pipe, _, _ = _built("wan")
    assert components(pipe) == {"transformer": pipe.transformer}
    assert components(pipe.transformer) == {"transformer": pipe.transformer}
    two, _ = wan(second=True)
    assert list(components(two)) == ["transformer", "transformer_2"]
    with pytest.raises(TypeError, match=r"dict is no transformer and no pipeline with one; pass"):
        components({})
    with pytest.raises(NotImplementedError, match=r"^Linear is not supported; `sparse-dit models`"):
        components(torch.nn.Linear(2, 2))


def test_two_transformers_share_a_run_by_noise_level():
    pipe, call = wan(second=True)
    recorders = [Recorder(), Recorder()]
    parts = components(pipe).values()
    attachments = [attach(part, seen) for part, seen in zip(parts, recorders, strict=True)]
    generate(pipe, call)
    high, low = ([c.context for c in seen.calls] for seen in recorders)
    assert {(c.run, c.step, c.sigma) for c in high} == {(0, 0, 1.0)}
    assert {(c.run, c.step) for c in low} == {(0, 0)}
    assert all(c.sigma < 0.1 for c in low)
    for attachment in attachments:
        attachment.detach()


def _attend(unit, *args, **kwargs):
    """One attention call through the seam's stand-in for a host function that records."""
    seen = []

    def host(query, key, value, *args, **kwargs):
        seen.append((args, kwargs))
        return value

    calls = []

    def intercept(call):
        calls.append(call)
        return call.stock()

    seam = processors.Seam("layer", processors.Tap(intercept))
    processors._ACTIVE.seam = seam
    try:
        processors._redirect(processors.Host(lambda: host, False))(
            unit, unit, unit, *args, **kwargs
        )
    finally:
        processors._ACTIVE.seam = None
    assert seen == [(args, kwargs)]
    return calls[0]


DENSE_MASK = torch.ones(1, 1, 4, 4, dtype=torch.bool)
HOLES = torch.tensor([[[[True, False, True, False]]]])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"scale": 0.5, "enable_gqa": True, "backend": "native", "dropout_p": 0.0}, None),
        ({"dropout_p": 0.1}, "attention dropout (0.1)"),
        ({"is_causal": True}, "a causal mask"),
        ({"parallel_config": object()}, "context parallelism"),
        ({"attention_kwargs": {"window": 3}}, "attention_kwargs ['window']"),
        ({"new_in_next_release": 1}, "arguments ['new_in_next_release'] of the host"),
        ({"attn_mask": DENSE_MASK}, "a dense mask (1, 1, 4, 4) of torch.bool"),
        ({"attn_mask": HOLES.float()}, "a dense mask (1, 1, 1, 4) of torch.float32"),
        ({"attn_mask": HOLES}, "a mask whose valid keys are not the first ones"),
        ({"attn_mask": ~HOLES & HOLES}, "a mask whose valid keys are not the first ones"),
        ({"attn_mask": DENSE_MASK[:, :, :1]}, None),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
def test_everything_reaches_stock_and_what_only_stock_honours_is_told(options, reason):
    call = _attend(torch.zeros(1, 4, 2, 8), **options)
    assert call.unsupported == reason
    assert call.kv_len is None
    assert call.scale == options.get("scale")
    assert call.attn_mask is options.get("attn_mask")


def test_positional_arguments_are_told_too():
    mask = torch.tensor([[True, True, False, False]])
    call = _attend(torch.zeros(1, 4, 2, 8), mask, 0.2)
    assert call.attn_mask is mask
    assert call.unsupported == "attention dropout (0.2)"
    call = _attend(torch.zeros(1, 4, 2, 8), mask, 0.0, False, 0.3)
    assert (call.kv_len.tolist(), call.scale, call.unsupported) == ([2], 0.3, None)


def test_a_mask_changed_in_place_is_read_again():
    mask = torch.tensor([[True, True, True, False]])
    tap = processors.Tap(stock_only)
    assert tap.read_mask(mask, 4)[0].tolist() == [3]
    mask[0, 2] = False
    assert tap.read_mask(mask, 4)[0].tolist() == [2]


def test_keys_of_another_length_are_not_self_attention():
    unit = torch.zeros(1, 4, 2, 8)
    seam = processors.Seam("layer", processors.Tap(lambda call: 1 / 0))
    processors._ACTIVE.seam = seam
    try:
        stand_in = processors._redirect(processors.Host(lambda: lambda q, k, v: v, False))
        out = stand_in(unit, unit[:, :2], unit[:, :2])
    finally:
        processors._ACTIVE.seam = None
    assert out.shape[1] == 2


def test_fused_projections_replace_cogvideox_processors_and_that_is_said(caplog):
    pipe, call = BUILDERS["cogvideox"]()
    stock = generate(pipe, call)
    attachment = attach(pipe.transformer, halve)
    pipe.fuse_qkv_projections()
    assert attachment.lost == LAYERS["cogvideox"]
    fused = generate(pipe, call)
    torch.testing.assert_close(fused, stock, rtol=1e-3, atol=1e-3)
    lines = [r.message for r in caplog.records if r.name == "sparse_dit"]
    assert len(lines) == 1
    assert "processors of 2 layers were replaced after patching" in lines[0]
    attachment.detach()
    assert torch.equal(generate(pipe, call), fused)
    pipe.unfuse_qkv_projections()  # puts our processors back, detached
    torch.testing.assert_close(generate(pipe, call), stock, rtol=1e-3, atol=1e-3)


def test_fused_first_then_attached():
    pipe, call = BUILDERS["cogvideox"]()
    pipe.fuse_qkv_projections()
    stock = generate(pipe, call)
    shared = pipe.transformer.transformer_blocks[0].attn1.processor
    assert shared is pipe.transformer.transformer_blocks[1].attn1.processor
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    assert torch.equal(generate(pipe, call), stock)
    assert [c.layer for c in recorder.calls] == LAYERS["cogvideox"] * 2
    attachment.detach()
    assert shared is pipe.transformer.transformer_blocks[1].attn1.processor
    assert torch.equal(generate(pipe, call), stock)


@pytest.mark.parametrize("family", ["wan", "cogvideox", "hunyuan_video"])
@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("cache", ["first block", "broadcast"])
def test_composes_with_the_hosts_caches(family, tiny, cache, cache_first):
    pipe, call, stock = tiny
    if cache == "first block":
        config = FirstBlockCacheConfig(threshold=10.0)
    else:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
        )
    pipe.transformer.enable_cache(config)
    cached = generate(pipe, call, num_inference_steps=4)
    if not cache_first:
        pipe.transformer.disable_cache()
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    if not cache_first:
        pipe.transformer.enable_cache(config)
    assert torch.equal(generate(pipe, call, num_inference_steps=4), cached)
    assert {c.context.sigma for c in recorder.calls} != {None}
    attachment.detach()
    assert torch.equal(generate(pipe, call, num_inference_steps=4), cached)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe, call), stock)


@pytest.mark.parametrize("family", ["wan"])
def test_hooks_of_others_on_the_root_come_and_go(family, tiny):
    """Offloading re-wraps `forward` before each run, and puts back what it found."""
    pipe, call, stock = tiny
    transformer = pipe.transformer
    recorder = Recorder()
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(ModelHook(), "before")
    attachment = attach(transformer, recorder)
    registry.register_hook(ModelHook(), "after")
    registry.remove_hook("before")
    assert torch.equal(generate(pipe, call), stock)
    registry.remove_hook("after")
    assert torch.equal(generate(pipe, call), stock)
    assert [c.context.run for c in recorder.calls] == [0] * 8 + [1] * 8
    registry.register_hook(ModelHook(), "last")
    attachment.detach()
    assert torch.equal(generate(pipe, call), stock)
    registry.remove_hook("last")
    del transformer.forward


@pytest.mark.parametrize("family", ["wan"])
def test_what_the_host_sets_on_a_processor_survives_removal(family, tiny):
    pipe, _, _ = tiny
    layer = pipe.transformer.blocks[0].attn1
    attachment = attach(pipe.transformer, stock_only)
    layer.set_attention_backend("_native_math")
    attachment.detach()
    assert layer.processor._attention_backend == "_native_math"
    del layer.processor._attention_backend


@pytest.mark.fresh
def test_a_thread_has_its_own_active_layer():
    """Both branches of guidance may run at once on two copies."""
    from concurrent.futures import ThreadPoolExecutor

    pipe, call, stock = _built("wan")
    pipes = [copy.deepcopy(pipe) for _ in range(2)]
    recorders = [Recorder(), Recorder()]
    for part, recorder in zip(pipes, recorders, strict=True):
        attach(part.transformer, recorder)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda p: generate(p, call), pipes))
    assert all(torch.equal(result, stock) for result in results)
    assert [len(r.calls) for r in recorders] == [8, 8]


def _video_inputs(transformer, frames=2):
    config = transformer.config
    return {
        "hidden_states": torch.zeros(1, config.in_channels, frames, 8, 8),
        "encoder_hidden_states": torch.zeros(1, 4, config.text_dim),
    }


def test_timesteps_a_token_and_positional_arguments():
    pipe, _, _ = _built("wan")
    attachment = attach(pipe.transformer, stock_only)
    inputs = _video_inputs(pipe.transformer)
    timestep = torch.full((1, 32), 750.0)
    timestep[:, :16] = 0  # tokens of a given first frame carry no noise
    with torch.no_grad():
        pipe.transformer(timestep=timestep, **inputs)
        assert attachment.context == StepContext(TokenLayout.video(2, 4, 4), 0.75, "cond", 0, 0)
        video, text = inputs.values()
        pipe.transformer(video, torch.tensor([250]), text)
        assert attachment.context == StepContext(TokenLayout.video(2, 4, 4), 0.25, "cond", 0, 1)
        pipe.transformer(video + 1, torch.tensor([250]), text)  # as second-order schedulers do
        assert attachment.context.step == 2
    attachment.detach()


def test_flux_ids_that_are_no_single_image_give_no_layout():
    pipe, call, stock = _built("flux")
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)

    def shuffle(module, args, kwargs):
        return args, {**kwargs, "img_ids": kwargs["img_ids"].flip(0)}

    hook = pipe.transformer.register_forward_pre_hook(shuffle, with_kwargs=True, prepend=True)
    generate(pipe, call)
    hook.remove()
    attachment.detach()
    assert {c.context.layout for c in recorder.calls} == {None}
    assert torch.equal(generate(pipe, call), stock)


def test_ltx_without_a_grid_gives_no_layout():
    pipe, _, _ = _built("ltx")
    attachment = attach(pipe.transformer, stock_only)
    with torch.no_grad():
        pipe.transformer(
            hidden_states=torch.zeros(1, 12, 8),
            encoder_hidden_states=torch.zeros(1, 4, 32),
            timestep=torch.tensor([500]),
            encoder_attention_mask=torch.ones(1, 4),
            video_coords=torch.zeros(1, 3, 12),
        )
    assert attachment.context == StepContext(None, 0.5, "any", 0, 0)
    attachment.detach()


@pytest.mark.fresh
def test_compiled_blocks_run_and_stay_equal():
    pipe, call = wan(num_layers=3)
    stock = generate(pipe, call)
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    compiled = generate(pipe, call)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, stock)
    assert [c.layer for c in recorder.calls[:3]] == [f"blocks.{i}.attn1" for i in range(3)]
    assert recorder.calls[-1].context.branch == "uncond"
    attachment.detach()


def test_classes_are_made_once():
    pipe, _, _ = _built("cogvideox")
    attachment = attach(pipe.transformer, stock_only)
    kinds = {type(layer.processor) for layer in attachment.layers.values()}
    attachment.detach()
    assert kinds == {processors.patched_class(CogVideoXAttnProcessor2_0)}
    assert kinds.pop().__name__ == "SparseDiTCogVideoXAttnProcessor2_0"
