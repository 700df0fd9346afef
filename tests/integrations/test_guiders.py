"""A patched pipeline under guidance that skips layers or perturbs attention, in both orders.

Under a dense plan the output is that of the guidance alone; under a sparse one it is finite and close.
"""

import copy
import functools

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

from sparse_dit.integrations.diffusers import attach
from sparse_dit.patch import patch
from tests.helpers.tiny_image_models import BUILDERS, generate
from tests.helpers.tiny_pipelines import wan
from tests.integrations import test_image_models as images
from tests.test_patch import DENSE, NARROW, drift

STEPS = 3


def skip(**options):
    return diffusers.LayerSkipConfig(indices=[0], fqn="auto", **options)


SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
THROUGHOUT = {"guidance_scale": 3.0, "skip_layer_guidance_start": 0.0}
GUIDERS = {
    "skip layer": lambda: diffusers.SkipLayerGuidance(
        skip_layer_config=skip(), skip_layer_guidance_stop=1.0, **THROUGHOUT
    ),
    "skip layer, no other guidance": lambda: diffusers.SkipLayerGuidance(
        skip_layer_config=skip(),
        skip_layer_guidance_stop=1.0,
        **{**THROUGHOUT, "guidance_scale": 1.0},
    ),
    "auto": lambda: diffusers.AutoGuidance(
        guidance_scale=3.0, auto_guidance_config=skip(dropout=1.0)
    ),
    "smoothed energy": lambda: diffusers.SmoothedEnergyGuidance(
        guidance_scale=3.0, seg_guidance_layers=[0]
    ),
    "perturbed attention": lambda: diffusers.PerturbedAttentionGuidance(
        guidance_scale=3.0,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=skip(**SCORES),
    ),
    "CFG zero star": lambda: diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=3.0),
    "adaptive projected": lambda: diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.5),
    "tangential": lambda: diffusers.TangentialClassifierFreeGuidance(guidance_scale=3.0),
}


@functools.cache
def _wan():
    return wan()


def modular_wan(guider):
    """Wan's denoising blocks, and what runs them."""
    pipe, call = _wan()
    modular = WanCoreDenoiseStep().init_pipeline()
    transformer = copy.deepcopy(pipe.transformer)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    modular.update_components(transformer=transformer, scheduler=scheduler, guider=guider)
    inputs = {k: call[k] for k in ("height", "width", "num_frames")}
    text = torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(2))
    inputs |= {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}

    def run():
        return modular(
            **inputs,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output="latents",
        )

    return modular, run


def hunyuan_image(guider):
    pipe, call = BUILDERS["hunyuan_image"]()
    pipe.register_modules(guider=guider)
    return pipe, lambda: generate(pipe, {**call, "num_inference_steps": STEPS})


PIPELINES = {"modular Wan": modular_wan, "HunyuanImage": hunyuan_image}
# the host knows no way to skip scores in Wan, and never counts forwards for smoothed energy
OTHERWISE = {("perturbed attention", "modular Wan")} | {
    ("smoothed energy", kind) for kind in PIPELINES
}
CASES = [
    pytest.param(guider, kind, id=f"{guider}-{kind}")
    for guider in GUIDERS
    for kind in PIPELINES
    if (guider, kind) not in OTHERWISE
]


@pytest.mark.parametrize(("guider", "kind"), CASES)
def test_a_guider_beside_a_patch(guider, kind):
    pipe, run = PIPELINES[kind](GUIDERS[guider]())
    alone = run()
    assert torch.equal(run(), alone)
    _, plain = PIPELINES[kind](diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    assert not torch.equal(plain(), alone), "the guider does something"
    with patch(pipe, images.plan_for(pipe.transformer, DENSE)):
        assert torch.equal(run(), alone)
    with patch(pipe, images.plan_for(pipe.transformer, NARROW)) as handle:
        sparse = run()
        assert handle.summary().lost == {"transformer": ()}
    assert handle.summary().sparse_calls > 0
    assert sparse.isfinite().all()
    assert 0 < drift(sparse, alone) < 0.5
    assert torch.equal(run(), alone)


@pytest.mark.parametrize("kind", PIPELINES)
def test_smoothed_energy_guidance_has_no_effect_in_the_host_itself(kind):
    """If this fails, the host was mended: move the cases to `CASES`, and mend the docs' table."""
    pipe, run = PIPELINES[kind](GUIDERS["smoothed energy"]())
    alone = run()
    _, plain = PIPELINES[kind](diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    assert torch.equal(alone, plain())
    with patch(pipe, images.plan_for(pipe.transformer, DENSE)):
        assert torch.equal(run(), alone)


def test_perturbed_attention_guidance_fails_on_wan_in_the_host_itself():
    """As above."""
    _, run = modular_wan(GUIDERS["perturbed attention"]())
    with pytest.raises(ValueError, match=r"WanAttnProcessor.* not registered"):
        run()


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_perturbed_prediction_runs_the_prompts_plan(kind):
    pipe, run = PIPELINES[kind](GUIDERS["skip layer"]())
    recorder = images.Recorder()
    attachment = attach(pipe.transformer, recorder)
    run()
    attachment.detach()
    seen = [c.context for c in recorder.calls if c.layer == recorder.calls[-1].layer]
    third = [(0, step, branch) for step in (1, 2) for branch in ("cond", "uncond", "cond")]
    assert [(c.run, c.step, c.branch) for c in seen] == [
        (0, 0, "cond"),
        (0, 0, "uncond"),
        *third,
    ]


def test_layers_that_a_pipeline_itself_skips():
    """Stable Diffusion 3: in a third prediction these layers' blocks don't run."""
    pipe, call = BUILDERS["sd3"]()
    plain = generate(pipe, {**call, "num_inference_steps": STEPS})
    call = {
        **call,
        "num_inference_steps": STEPS,
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }
    alone = generate(pipe, call)
    assert not torch.equal(alone, plain)
    with patch(pipe, images.plan_for(pipe.transformer, DENSE)):
        assert torch.equal(generate(pipe, call), alone)
    with patch(pipe, images.plan_for(pipe.transformer, NARROW)) as handle:
        assert 0 < drift(generate(pipe, call), alone) < 0.5
    assert handle.summary().dense_calls == 0


def test_a_pipeline_that_perturbs_attention_by_processors_of_its_own(caplog):
    """PixArt's PAG pipeline sets them in its call and puts the present ones back afterwards."""
    pipe, call = BUILDERS["pixart"]()
    plain = generate(pipe, call)
    parts = {**pipe.components, "pag_applied_layers": "blocks.1"}
    pipe = diffusers.PixArtSigmaPAGPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    alone = generate(pipe, call)
    assert not torch.equal(alone, plain)
    with patch(pipe, images.plan_for(pipe.transformer, DENSE)):
        assert torch.equal(generate(pipe, call), alone)
    with patch(pipe, images.plan_for(pipe.transformer, NARROW)) as handle:
        assert 0 < drift(generate(pipe, call), alone) < 0.5
        assert handle.summary().lost == {"transformer": ()}, "put back"
    layers = {r.layer for r in handle.ran["transformer"]}
    assert layers == {"transformer_blocks.0.attn1"}
    assert "1 layers were replaced after patching" in caplog.text
    assert torch.equal(generate(pipe, call), alone)
