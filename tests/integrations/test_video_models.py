import functools
from collections import Counter

import diffusers
import pytest
import torch

from sparse_dit.index import SparseIndex
from sparse_dit.integrations.diffusers import (
    attach,
    attachment_of,
    heads_of,
    self_attention_layers,
)
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.integrations.processors import Tap
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patch import patch
from sparse_dit.patterns import Pattern, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from tests.helpers.tiny_video_models import BUILDERS, WAN, run

# Mochi's own: it asks for autocast to float32, which a CPU doesn't have
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
MODEL = pytest.mark.parametrize("name", BUILDERS)
NARROW = Pattern(Window(frames=0, rows=1, columns=1), tile=(1, 2, 2))
WIDE = Pattern(Window(frames=99, rows=99, columns=99), tile=(1, 2, 2))

WAN_LAYERS = ["blocks.0.attn1", "blocks.1.attn1"]
BLOCKS = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
JOINT = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
LAYERS = {
    "wan_i2v": WAN_LAYERS,
    "wan_ti2v": WAN_LAYERS,
    "wan_vace": [*WAN_LAYERS, "vace_blocks.0.attn1"],
    "wan_animate": WAN_LAYERS,
    "skyreels": WAN_LAYERS,
    "chronoedit": WAN_LAYERS,
    "cogvideox15": BLOCKS,
    "consisid": BLOCKS,
    "hunyuan_i2v": JOINT,
    "framepack": JOINT,
    "hunyuan15": ["transformer_blocks.0.attn", "transformer_blocks.1.attn"],
    "ltx2": BLOCKS,
    "mochi": BLOCKS,
    "allegro": BLOCKS,
    "easyanimate": BLOCKS,
    "cosmos": BLOCKS,
    "cosmos1": BLOCKS,
    "anyflow": WAN_LAYERS,
    "joyimage": ["double_blocks.0.attn", "double_blocks.1.attn"],
    "kandinsky": [f"visual_transformer_blocks.{n}.self_attention" for n in range(2)],
    "kandinsky6": [
        f"visual_transformer_blocks.{n}.video_dec_block.self_attention" for n in range(2)
    ],
    "motif": JOINT,
    "helios": WAN_LAYERS,
    "minimax_h3": ["transformer_blocks.0.attn", "transformer_blocks.1.attn"],
}


def _video(frames=3, before=0, after=0):
    return TokenLayout.video(frames, 8, 8, text_before=before, text_after=after)


# layouts of a layer's calls in one run of all forwards
LAYOUTS = {name: [_video(), _video()] for name in BUILDERS} | {
    "chronoedit": [_video(2), _video(2)],
    "cogvideox15": [_video(2, before=12)],
    "consisid": [_video(before=12)],
    "hunyuan_i2v": [_video(after=12)],
    "framepack": [_video(before=148, after=17), _video(before=148, after=12)],
    "hunyuan15": [_video(after=22), _video(after=22)],
    "ltx2": [_video()],
    "mochi": [_video(), _video(after=2), _video(after=12), _video(after=7)],
    "allegro": [_video()],
    "easyanimate": [_video(before=17)],
    "joyimage": [TokenLayout.video(1, 8, 8, text_after=64 + 12)] * 2,
    "motif": [_video(after=12), _video(after=12)],
    "helios": [_video(before=64 + 16 + 4)] * 2,
    "minimax_h3": [_video(before=before + 12 + 10) for before in (0, 2 * 64, 4 * 6 + 8 + 2 * 64)],
}
KV_LEN = {
    "hunyuan_i2v": [[204, 199]],
    "framepack": [[357, 352], None],
    "hunyuan15": [[204, 203], [208, 207]],
    "motif": [[204, 199], [195, 195]],
}


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, call):
        self.calls.append(call)
        return call.stock()


@functools.cache
def _built(name):
    transformer, calls = BUILDERS[name]()
    return transformer, calls, run(transformer, calls)


@pytest.fixture(autouse=True)
def nothing_stays_patched(request):
    yield
    if name := getattr(request.node, "callspec", None) and request.node.callspec.params.get("name"):
        assert attachment_of(_built(name)[0]) is None


def plan_for(transformer, pattern):
    heads = heads_of(transformer)
    part = ComponentPlan(
        layout=_video(),
        stages=(Stage(1.0, 0.0),),
        layers={n: ((HeadChoice(pattern),) * num_heads,) for n, (num_heads, _) in heads.items()},
        model_class=type(transformer).__name__,
        config_hash=config_hash(transformer.config),
        heads=heads,
    )
    return Plan("Pipeline", {"transformer": part}, 0.4)


def run_sparse(name, pattern):
    """Outputs under a plan, after checking that every layer ran sparse in every call."""
    transformer, calls, _ = _built(name)
    with patch(transformer, plan_for(transformer, pattern)) as handle:
        outputs = run(transformer, calls)
    ran = handle.ran["transformer"]
    assert {r.dense_because for r in ran} == {None}
    counts = Counter()  # over the lengths of sequences
    for r in ran:
        counts[r.layer] += r.calls
    assert counts == dict.fromkeys(LAYERS[name], len(LAYOUTS[name]))
    return outputs, sum(r.computed for r in ran) / sum(r.pairs for r in ran)


def recorded(transformer, calls):
    recorder = Recorder()
    attachment = attach(transformer, recorder)
    outputs = run(transformer, calls)
    attachment.detach()
    return recorder.calls, outputs


def drift(a, b):
    return ((a - b).norm() / b.norm()).item()


@MODEL
def test_dense_is_bit_equal_and_removal_restores_the_objects(name):
    transformer, calls, stock = _built(name)
    layers = self_attention_layers(transformer)
    before = {n: layer.processor for n, layer in layers.items()}
    _, outputs = recorded(transformer, calls)
    assert all(torch.equal(a, b) for a, b in zip(outputs, stock, strict=True))
    assert all(layer.processor is before[n] for n, layer in layers.items())
    assert all(x.isfinite().all() for x in stock)


@MODEL
def test_layers_layouts_heads_masks_and_noise_levels(name):
    transformer, calls, _ = _built(name)
    seen, _ = recorded(transformer, calls)
    assert list(self_attention_layers(transformer)) == LAYERS[name]
    assert {c.layer for c in seen} == set(LAYERS[name])
    for layer in LAYERS[name]:
        mine = [c for c in seen if c.layer == layer]
        assert [c.context.layout for c in mine] == LAYOUTS[name]
        lengths = [None if c.kv_len is None else c.kv_len.tolist() for c in mine]
        assert lengths == KV_LEN.get(name, [None] * len(mine))
    for c in seen:
        assert c.q.shape[1] == c.context.layout.seq_len
        assert c.q.shape[2:] == heads_of(transformer)[c.layer]
        assert c.context.sigma == pytest.approx(0.7)
        assert c.unsupported is None


@MODEL
def test_a_sparse_plan_runs_in_every_call_and_changes_the_output(name):
    transformer, calls, stock = _built(name)
    outputs, density = run_sparse(name, NARROW)
    assert density < 0.9
    for sparse, dense in zip(outputs, stock, strict=True):
        assert sparse.isfinite().all()
        assert 0 < drift(sparse, dense) < 0.5
    again = run(transformer, calls)
    assert all(torch.equal(a, b) for a, b in zip(again, stock, strict=True))


@MODEL
def test_a_window_as_wide_as_the_video_is_dense_attention(name, monkeypatch):
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    outputs, density = run_sparse(name, WIDE)
    for wide, dense in zip(outputs, _built(name)[2], strict=True):
        torch.testing.assert_close(wide, dense, rtol=2e-4, atol=2e-4)
    assert density == pytest.approx(1)


@MODEL
def test_inference_mode_gives_the_same(name):
    transformer, calls, _ = _built(name)
    with patch(transformer, plan_for(transformer, NARROW)):
        sparse = run(transformer, calls)
        with torch.inference_mode():
            copies = [
                {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
                for call in calls
            ]
            inferred = run(transformer, copies)
    assert all(torch.equal(a, b) for a, b in zip(inferred, sparse, strict=True))


def test_validity_of_hunyuan15_is_what_its_masks_say():
    transformer, calls, _ = _built("hunyuan15")
    seen, _ = recorded(transformer, calls)
    for c in seen:
        place = torch.arange(c.q.shape[1])
        valid = place < c.kv_len[:, None]
        assert torch.equal(c.attn_mask[:, 0], valid[:, :, None] & valid[:, None])


def test_validity_of_hunyuan15_follows_a_mask_that_is_changed_in_place():
    transformer, calls, _ = _built("hunyuan15")
    call = {**calls[0], "encoder_attention_mask": calls[0]["encoder_attention_mask"].clone()}
    first, _ = recorded(transformer, [call])
    call["encoder_attention_mask"][1, 6] = 0
    second, _ = recorded(transformer, [call])
    assert (first[0].kv_len - second[0].kv_len).tolist() == [0, 1]


def _coords(times, rows=2, columns=3):
    """Coordinates of LTX's tokens, one frame a time: `[1, 3, N]`."""
    axes = torch.as_tensor(times, dtype=torch.float), torch.arange(rows) * 32.0
    return torch.cartesian_prod(*axes, torch.arange(columns) * 32.0).T[None]


@pytest.mark.parametrize(
    ("times", "frames", "before", "after"),
    [
        ([0.0], 1, 0, 0),
        ([0.0, 0.04, 0.36], 3, 0, 0),
        ([0.8, 0.0, 0.04, 0.36], 3, 1, 0),  # a keyframe
        ([0.4, 0.8, 0.0, 0.04, 0.36], 3, 2, 0),  # two
        ([0.8, 0.0], 1, 1, 0),
        ([0.0, 0.04, 0.36, 0.0, -0.04], 3, 0, 2),  # frames out of turn at the end
    ],
)
def test_the_grid_of_ltx_is_read_from_coordinates(times, frames, before, after):
    layout = FAMILIES["LTXVideoTransformer3DModel"].layout
    found = layout(None, {"video_coords": _coords(times), "num_frames": 1, "height": 1, "width": 1})
    assert found == TokenLayout.video(frames, 2, 3, text_before=6 * before, text_after=6 * after)


def test_coordinates_of_ltx_that_are_no_frames_give_no_layout():
    layout = FAMILIES["LTXVideoTransformer3DModel"].layout
    coords = _coords([0.0, 0.04, 0.36])
    order = torch.arange(18)
    order[[7, 8]] = order[[8, 7]]
    for wrong in (coords[..., :-1], coords[..., order], torch.zeros(1, 3, 12), coords.flip(2)):
        assert layout(None, {"video_coords": wrong}) is None


def test_keyframes_that_are_appended_to_ltx2_are_tokens_that_all_see():
    transformer, calls, _ = _built("ltx2")
    coords = transformer.rope.prepare_video_coords(4, 3, 8, 8, torch.device("cpu"))
    call = {
        **calls[0],
        "hidden_states": torch.cat([calls[0]["hidden_states"]] * 2, 1)[:, :200],
        "video_coords": torch.cat([coords, coords[:, :, :8]], 2),
    }
    seen, _ = recorded(transformer, [call])
    assert {c.context.layout for c in seen} == {
        TokenLayout((Segment.grid(3, 8, 8), Segment.global_(8)))
    }
    assert {c.q.shape[1] for c in seen} == {200}
    seen, _ = recorded(transformer, [{**call, "num_frames": None}])
    assert {c.context.layout for c in seen} == {None}


def test_a_mask_of_ltx2_between_tokens_runs_dense_and_says_so():
    transformer, calls, _ = _built("ltx2")
    mask = torch.ones(4, 192, 192)
    with patch(transformer, plan_for(transformer, NARROW)) as handle:
        run(transformer, [{**calls[0], "video_self_attention_mask": mask}])
    assert {r.dense_because for r in handle.ran["transformer"]} == {
        "the host asked for a dense mask (4, 2, 192, 192) of torch.float32"
    }


def test_block_causal_skyreels_runs_dense_and_says_so():
    torch.manual_seed(0)
    transformer = diffusers.SkyReelsV2Transformer3DModel(**WAN, num_frame_per_block=3).eval()
    _, calls, _ = _built("skyreels")
    stock = run(transformer, calls[:1])
    with patch(transformer, plan_for(transformer, NARROW)) as handle:
        assert torch.equal(run(transformer, calls[:1])[0], stock[0])
    assert {r.dense_because for r in handle.ran["transformer"]} == {
        "the host asked for a dense mask (1, 1, 192, 192) of torch.bool"
    }


def test_kandinsky_with_its_own_sparse_attention_has_no_layout_and_its_mask_is_named():
    from torch.nn.attention.flex_attention import create_block_mask

    transformer, calls, _ = _built("kandinsky")
    layout = FAMILIES[type(transformer).__name__].layout
    assert layout(transformer.config, calls[0]) == _video()
    assert layout(transformer.config, {**calls[0], "sparse_params": {"P": 0.9}}) is None
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    assert Tap(lambda call: call.stock()).read_mask(mask, 128) == (None, "a BlockMask")


def test_framepack_without_history_is_video_and_text():
    transformer, calls, _ = _built("framepack")
    layout = FAMILIES[type(transformer).__name__].layout
    names = ("latents_clean", "latents_history_2x", "latents_history_4x")
    bare = {k: v for k, v in calls[1].items() if k not in names}
    assert layout(transformer.config, bare) == _video(after=12)
    odd = {**bare, "latents_history_4x": torch.zeros(1, 4, 5, 18, 14)}
    assert layout(transformer.config, odd) == _video(before=2 * 3 * 2, after=12)


def test_a_layout_is_cut_in_its_last_text_alone():
    layout = _video(before=3, after=5)
    assert layout.cut(layout.seq_len) is layout
    assert layout.cut(layout.seq_len - 2) == _video(before=3, after=3)
    assert layout.cut(layout.seq_len - 5) == _video(before=3)
    for wrong in (layout.seq_len - 6, layout.seq_len + 1):
        assert layout.cut(wrong) is layout
    assert _video().cut(100) == _video()
    assert TokenLayout((Segment.global_(4),)).cut(2) == TokenLayout((Segment.global_(4),))
