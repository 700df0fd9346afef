"""Patched pipelines under `torch.autocast`, where norms leave q and k in float32 and v is half."""

import pytest
import torch

from sparse_dit.integrations.diffusers import components, heads_of
from sparse_dit.layout import TokenLayout
from sparse_dit.patch import patch
from sparse_dit.patterns import Dense, Pattern, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from tests.helpers import tiny_image_models, tiny_pipelines, tiny_video_models

pytestmark = pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # the host's
DENSE = Pattern(Dense())
FAR = Pattern(Window(frames=0, rows=1, columns=1), tile=(1, 2, 2), far=True)
PIPELINES = {**tiny_image_models.BUILDERS, **tiny_pipelines.BUILDERS}
NAMES = ("hunyuan_video", "wan", "qwen", "sd3", "zimage", "hunyuan_image", "hunyuan15", "anyflow")


def plan_for(host, pattern):
    parts = {}
    for name, transformer in components(host).items():
        heads, choice = heads_of(transformer), HeadChoice(pattern)
        parts[name] = ComponentPlan(
            model_class=type(transformer).__name__,
            config_hash=config_hash(transformer.config),
            heads=heads,
            layout=TokenLayout.video(2, 2, 2),
            stages=(Stage(1.0, 0.0),),
            layers={layer: ((choice,) * num_heads,) for layer, (num_heads, _) in heads.items()},
        )
    return Plan("Pipeline", parts, 0.4)


def built(name):
    """What is patched, and a function that runs it."""
    if name in PIPELINES:
        pipe, call = PIPELINES[name]()
        return pipe, lambda: [tiny_pipelines.generate(pipe, call)]
    transformer, calls = tiny_video_models.BUILDERS[name]()
    return transformer, lambda: tiny_video_models.run(transformer, calls)


def drift(ours, want):
    return max(
        ((a - b).float().norm() / b.float().norm()).item() for a, b in zip(ours, want, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_model_under_autocast(name):
    """Dense as stock to the bit; sparse close to it, every call."""
    host, run = built(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = run()
        with patch(host, plan_for(host, DENSE)):
            assert all(torch.equal(a, b) for a, b in zip(run(), stock, strict=True))
        with patch(host, plan_for(host, FAR)) as handle:
            got = run()
    assert handle.summary().sparse_calls > 0 and handle.summary().dense_calls == 0
    assert {a.dtype for a in got} == {a.dtype for a in stock} and drift(got, stock) < 0.5


def test_compiled_under_autocast():
    """While a compiled graph runs autocast is off, so that the seam's operator must get what was cast."""
    host, run = built("hunyuan_video")
    plan = plan_for(host, FAR)
    layers = plan.components["transformer"].layers
    del layers[next(iter(layers))]  # which runs stock, by the same operator
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16), patch(host, plan) as handle:
        want = run()
        host.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert drift(run(), want) < 0.02
    assert handle.summary().sparse_calls > 0 and handle.summary().dense_calls > 0
    torch._dynamo.reset()
