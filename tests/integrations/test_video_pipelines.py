"""Whole video pipelines: stock under the seam, sparse in every layer under a plan, stock again afterwards."""

from collections import Counter

import pytest
import torch

from sparse_dit.integrations.diffusers import attach, attachment_of
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patch import patch
from tests.helpers import tiny_image_models, tiny_pipelines
from tests.helpers.tiny_pipelines import generate
from tests.helpers.tiny_video_pipelines import PIPELINES
from tests.integrations.test_video_models import LAYERS as MODEL_LAYERS
from tests.integrations.test_video_models import NARROW, WAN_LAYERS, Recorder, drift, plan_for

pytestmark = [
    # Mochi asks for autocast to float32, which a CPU doesn't have
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    # hosts' own: schedulers that give numpy a tensor, Chroma's import
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
BOTH = ("cond", "uncond")


def _video(frames=3, before=0, after=0, side=8):
    return TokenLayout.video(frames, side, side, text_before=before, text_after=after)


def _steps(layouts, sigmas, branches=("any",)):
    """One forward a step, layout and branch, in that order."""
    layouts = layouts if isinstance(layouts, list) else [layouts] * len(sigmas)
    return [
        (layout, sigma, branch)
        for layout, sigma in zip(layouts, sigmas, strict=True)
        for branch in branches
    ]


KEYFRAME = TokenLayout((Segment.grid(3, 8, 8), Segment.global_(64)))
# (layout, noise level, branch) of the first layer's calls, from what the schedulers' tables say
STEPS = {
    "mochi": [(_video(after=text), sigma, "any") for sigma in (1, 0.975) for text in (0, 0, 7, 12)],
    "allegro": _steps(_video(), (0.5, 0)),
    "skyreels": _steps(_video(), (1, 0.06), BOTH),
    "skyreels_forcing": _steps(_video(), (0.999, 0.999, 0.999, 0.889), BOTH),
    "wan_vace": _steps(_video(side=4), (1, 0.009), BOTH),
    "anyflow": _steps(_video(), (1, 0.5)),
    "hunyuan15": _steps(_video(after=729 + 6 + 12), (1, 0.875), BOTH),
    "wan_i2v": _steps(_video(), (1, 0.009), BOTH),
    "wan_ti2v": _steps(_video(), (1, 0.009), BOTH),
    "wan_animate": _steps(_video(side=4), (1, 0.009), BOTH) * 2,
    "chronoedit": _steps([_video(), _video(2)], (0.999, 0.75), BOTH),
    "cogvideox_i2v": _steps(_video(2, before=12), (0.5, 0)),
    "consisid": _steps(_video(before=12), (0.5, 0)),
    "hunyuan_i2v": _steps(_video(after=12), (1, 0.875), BOTH),
    # history of 16 + 128 + 16 tokens; image and text of 5 + 7 or 5 + 3
    "framepack": [
        (_video(before=160, after=after), sigma, branch)
        for sigma in (1, 0.875)
        for branch, after in (("cond", 12), ("uncond", 8))
    ]
    * 2,
    "ltx_condition": _steps(_video(5, before=64), (1, 0.975)),
    "ltx_long": [step for after in (0, 64) for step in _steps(_video(4, after=after), (1, 0.5005))],
    # guidance in one batch, then the prompt alone with a layer perturbed, then without sound
    "ltx2": _steps(_video(), (1, 0.5), ("any",) * 3),
    "ltx2_condition": _steps(KEYFRAME, (1, 0.5), ("any",) * 3),
    "easyanimate": _steps(_video(before=12), (1, 0.001)),
    "cosmos1": _steps(_video(), (80 / 81, 0.002), BOTH),
    "cosmos2": _steps(_video(), (80 / 81, 0.002), BOTH),
    "cosmos25": _steps(_video(), (1, 0.009), BOTH),
    "kandinsky": _steps(_video(), (1, 0.024), BOTH),
    "motif": _steps(_video(after=12), (1, 0.75), BOTH),
    "helios": _steps(_video(before=37, side=4), (0.999, 0.4995), BOTH) * 2,
    "helios_pyramid": _steps(
        [_video(before=148, side=side) for side in (2, 4, 8)], (0.999, 0.747, 0.387), BOTH
    ),
    "minimax_h3": _steps(_video(37, before=12 + 2 * 207, side=4), (1, 0.923)),
}
LAYERS = MODEL_LAYERS | {
    "skyreels_forcing": WAN_LAYERS,
    "cogvideox_i2v": MODEL_LAYERS["cogvideox15"],
    **dict.fromkeys(("ltx_condition", "ltx_long", "ltx2_condition"), MODEL_LAYERS["ltx2"]),
    "cosmos2": MODEL_LAYERS["cosmos"],
    "cosmos25": MODEL_LAYERS["cosmos"],
    "helios_pyramid": WAN_LAYERS,
}
# layers that the host leaves out of some forwards
SKIPPED = {
    kind: {"transformer_blocks.1.attn1": 2}  # perturbed: it takes the values as they are
    for kind in ("ltx2", "ltx2_condition")
}
DENSE = {  # Motif-Video's decoder attends over two copies of the video
    "motif": {
        "single_transformer_blocks.1.attn": "attention over 384 tokens, but the grid "
        "3x8x8 + 12 global has 204"
    }
}


def test_models_without_a_pipeline_in_the_tests_are_told_so():
    built = {**tiny_pipelines.BUILDERS, **tiny_image_models.BUILDERS, **PIPELINES}
    whole = {type(make()[0].transformer).__name__ for make in built.values()}
    told = {name for name, family in FAMILIES.items() if family.tested == "pipeline"}
    assert told == whole


@pytest.mark.parametrize("kind", PIPELINES)
def test_whole_pipelines_dense_and_sparse(kind):
    pipe, call = PIPELINES[kind]()
    stock = generate(pipe, call)
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    assert torch.equal(generate(pipe, call), stock)
    attachment.detach()
    first = [c.context for c in recorder.calls if c.layer == LAYERS[kind][0]]
    for context, (layout, sigma, branch) in zip(first, STEPS[kind], strict=True):
        assert (context.layout, context.branch) == (layout, branch)
        assert context.sigma == pytest.approx(sigma, abs=1e-3)
    with patch(pipe, plan_for(pipe.transformer, NARROW)) as handle:
        sparse = generate(pipe, call)
    dense, forwards = DENSE.get(kind, {}), len(STEPS[kind])
    skipped = SKIPPED.get(kind, {})
    counts = Counter()  # over the lengths of sequences
    for r in handle.ran["transformer"]:
        counts[r.layer, r.dense_because] += r.calls
    assert counts == {
        **{(layer, None): forwards - skipped.get(layer, 0) for layer in LAYERS[kind]},
        **dict.fromkeys(dense.items(), forwards),
    }
    assert handle.summary().dense_calls == forwards * len(dense)
    assert sparse.isfinite().all()
    assert 0 < drift(sparse, stock) < 0.5
    assert attachment_of(pipe.transformer) is None
    assert torch.equal(generate(pipe, call), stock)
