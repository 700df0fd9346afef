"""A patched pipeline with what else people do to it, in both orders.

Under a dense plan the output is that of the technique alone; under a sparse one it is finite and close.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import accelerate
import diffusers
import peft
import pytest
import torch
from diffusers.hooks import apply_layer_skip

from sparse_dit.patch import patch
from tests.helpers import tiny_image_models as image_models
from tests.helpers.tiny_pipelines import BUILDERS, generate
from tests.test_patch import DENSE, FAR, NARROW, drift, plan_for

CPU = torch.device("cpu")
STEPS = 4


SKIPPABLE = ("pixart", "cogview", "hunyuan_image")  # the host knows their processors


@dataclass(frozen=True)
class Technique:
    """What is done to a pipeline; the families whose stock pipelines bear it."""

    apply: Callable
    families: tuple[str, ...] = ("wan", "cogvideox", "flux")


def to_dtype(dtype):
    return lambda pipe: pipe.to(dtype)


def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def group_offload(kind):
    def apply(pipe):
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.transformer.enable_group_offload(CPU, CPU, offload_type=kind, **blocks)

    return apply


def model_offload(pipe):
    accelerate.cpu_offload_with_hook(pipe.transformer, CPU)


def sequential_offload(pipe):
    accelerate.cpu_offload(pipe.transformer, CPU)


def lora(pipe, names=("to_q", "to_k", "to_v", "to_out.0")):
    torch.manual_seed(1)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=4, target_modules=list(names), init_lora_weights=False), "style"
    )


def fused_lora(pipe):
    lora(pipe)
    pipe.transformer.fuse_lora()


def unloaded_lora(pipe):
    lora(pipe)
    pipe.transformer.delete_adapters("style")


def fused_projections(pipe):
    pipe.transformer.fuse_qkv_projections()


def cache(config):
    return lambda pipe: pipe.transformer.enable_cache(config(pipe))


def first_block(pipe):
    return diffusers.FirstBlockCacheConfig(threshold=10.0)


def broadcast(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )


def _timestep(pipe):
    return int(
        pipe._current_timestep if hasattr(pipe, "_current_timestep") else pipe.current_timestep
    )


def faster_cache(distilled):
    return lambda pipe: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 700),
        current_timestep_callback=lambda: _timestep(pipe),
        attention_weight_callback=lambda _: 0.3,
        is_guidance_distilled=distilled,
        tensor_format="BFCHW",
    )


def mag_cache(pipe):
    return diffusers.MagCacheConfig(
        mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, retention_ratio=0.25
    )


def taylor_seer(pipe):
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, cache_identifiers=[".*attn1?$"]
    )


def layer_skip(**options):
    def apply(pipe):
        fqn = "blocks" if hasattr(pipe.transformer, "blocks") else "transformer_blocks"
        config = diffusers.LayerSkipConfig(indices=[0], fqn=fqn, **options)
        apply_layer_skip(pipe.transformer, config)

    return apply


TECHNIQUES = {
    "bfloat16": Technique(to_dtype(torch.bfloat16)),
    "float16": Technique(to_dtype(torch.float16)),
    "layerwise casting": Technique(layerwise_casting),
    "group offload, blocks": Technique(group_offload("block_level")),
    "group offload, leaves": Technique(group_offload("leaf_level")),
    "model offload": Technique(model_offload),
    "sequential offload": Technique(sequential_offload),
    "LoRA": Technique(lora),
    "LoRA fused": Technique(fused_lora),
    "LoRA unloaded": Technique(unloaded_lora),
    # CogVideoX's replaces the processors: after patching that takes the patch off, see test_patch.py
    "fused projections": Technique(fused_projections, ("wan", "flux")),
    "pyramid attention broadcast": Technique(cache(broadcast)),
    "first block cache": Technique(cache(first_block)),
    "faster cache, distilled": Technique(cache(faster_cache(True))),
    "faster cache": Technique(cache(faster_cache(False)), ("cogvideox",)),
    "MagCache": Technique(cache(mag_cache)),
    "TaylorSeer": Technique(cache(taylor_seer)),
    "layer skip, blocks": Technique(layer_skip(), ("wan", "cogvideox")),
    "layer skip, attention": Technique(layer_skip(skip_ff=False), SKIPPABLE[:2]),
    "layer skip, scores": Technique(
        layer_skip(skip_attention=False, skip_attention_scores=True, skip_ff=False), SKIPPABLE
    ),
}
# what fails in the stock pipeline, and how
STOCK_FAILS = {
    ("faster cache", "wan"): (IndexError, "tuple index"),
    ("faster cache", "flux"): (IndexError, "tuple index"),
    ("layer skip, blocks", "flux"): (RuntimeError, "must match the size"),
    ("layer skip, attention", "wan"): (ValueError, "WanAttnProcessor.* not registered"),
    ("layer skip, attention", "cogvideox"): (ValueError, "CogVideoX.* not registered"),
    ("layer skip, attention", "flux"): (AttributeError, "is_cross_attention"),
    ("layer skip, attention", "hunyuan_image"): (ValueError, "not enough values to unpack"),
    ("layer skip, scores", "wan"): (ValueError, "WanAttnProcessor.* not registered"),
    ("layer skip, scores", "cogvideox"): (ValueError, "CogVideoX.* not registered"),
    ("layer skip, scores", "flux"): (AttributeError, "is_cross_attention"),
}
CASES = [
    pytest.param(technique, family, id=f"{name}-{family}")
    for name, technique in TECHNIQUES.items()
    for family in technique.families
]


@functools.cache
def _built(family):
    return (BUILDERS | image_models.BUILDERS)[family]()


def fresh(family):
    """A pipeline of its own, and its call."""
    pipe, call = _built(family)
    return copy.deepcopy(pipe), {**call, "num_inference_steps": STEPS}


def run(pipe, call, plan=None):
    """Latents, and how many calls were sparse; the pipeline is stock again afterwards."""
    if plan is None:
        return generate(pipe, call), 0
    with patch(pipe, plan) as handle:
        latents = generate(pipe, call)
    return latents, handle.summary().sparse_calls


def patched_first(family, technique, plan):
    pipe, call = fresh(family)
    handle = patch(pipe, plan)
    technique.apply(pipe)
    latents = generate(pipe, call)
    assert handle.summary().lost == {"transformer": ()}
    handle.remove()
    return latents, generate(pipe, call)


@pytest.mark.parametrize(("technique", "family"), CASES)
# FasterCache's own call
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_a_technique_and_a_patch_in_both_orders(technique, family):
    pipe, call = fresh(family)
    dense, sparse = plan_for(pipe, DENSE), plan_for(pipe, FAR, NARROW)
    technique.apply(pipe)
    alone, _ = run(pipe, call)
    assert torch.equal(run(pipe, call, dense)[0], alone)
    close, sparse_calls = run(pipe, call, sparse)
    assert sparse_calls > 0
    assert close.isfinite().all()
    assert 0 < drift(close, alone) < 0.3
    assert torch.equal(run(pipe, call)[0], alone)
    again, removed = patched_first(family, technique, dense)
    assert torch.equal(again, alone)
    assert torch.equal(removed, alone)
    again, removed = patched_first(family, technique, sparse)
    assert torch.equal(again, close)
    assert torch.equal(removed, alone)


@pytest.mark.parametrize(("name", "family"), STOCK_FAILS, ids="-".join)
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_what_the_stock_pipeline_fails_at(name, family):
    """If this fails, the host was mended: move the case to `TECHNIQUES`, and mend the docs' table."""
    pipe, call = fresh(family)
    error, message = STOCK_FAILS[name, family]
    with pytest.raises(error, match=message):
        TECHNIQUES[name].apply(pipe)
        generate(pipe, call)


def test_skipped_scores_are_skipped_under_a_sparse_plan_and_told():
    pipe, call = fresh("pixart")
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        TECHNIQUES["layer skip, scores"].apply(pipe)
        generate(pipe, call)
    reasons = {r.dense_because for r in handle.ran["transformer"]}
    assert reasons == {None, "the host asked for skipped attention scores"}


def test_a_lora_that_is_unloaded_leaves_stock():
    pipe, call = fresh("wan")
    stock = generate(pipe, call)
    with patch(pipe, plan_for(pipe, DENSE)):
        lora(pipe)
        assert not torch.equal(generate(pipe, call), stock)
        pipe.transformer.delete_adapters("style")
        assert torch.equal(generate(pipe, call), stock)
