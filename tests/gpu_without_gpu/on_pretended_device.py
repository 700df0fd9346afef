"""What computes with torch alone, on a device that only says it is another.

`test_pretended_device.py` runs this in a process of its own: torch learns of the device for good.
"""

import pytest
import torch

from sparse_dit.attention import BACKENDS, attend, block_mass
from sparse_dit.backends import selfcheck
from sparse_dit.backends.flex import _call
from sparse_dit.backends.flex_lists import lists_of
from sparse_dit.call import AttentionCall, StepContext
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.index import build_index
from sparse_dit.inputs import load_pipeline
from sparse_dit.intervals import RowIntervals
from sparse_dit.layout import TokenLayout
from sparse_dit.nan_guard import finite_or_dense
from sparse_dit.search import sampling, search_plan
from sparse_dit.search.candidates import tilings
from sparse_dit.search.cells import cell_table
from sparse_dit.search.check import check_plan
from sparse_dit.search.profile import ComponentProfile
from sparse_dit.search.recorder import Recorder
from sparse_dit.timing import Stopwatch
from tests.gpu_without_gpu.pretended_device import DEVICE, PretendedDevice
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.kernel_cases import in_order, qkv, until
from tests.helpers.search_cases import stub_costs

FIRSTS = range(0, len(PATTERN_CASES), 36)


@pytest.fixture(autouse=True)
def device():
    with PretendedDevice():
        yield


def made(layout, first, causal=False):
    patterns = (PATTERN_CASES[first : first + 6] * 6)[:6]
    index = build_index(patterns, layout, group=32)
    index = in_order(index, 2) if causal else index
    return index, qkv(index, 16, batch=2, kv_heads=3, seed=first)


def test_mixed_devices_are_told():
    there = torch.ones(3).to(DEVICE)
    assert there.device == DEVICE and (there + 1).device == DEVICE
    assert torch.equal((there + there).cpu(), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)


@pytest.mark.parametrize("name", ["gather", "reference"])
def test_the_check_before_first_use(name):
    assert selfcheck.examine(BACKENDS[name], DEVICE, 16, torch.float32).problem is None


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("first", FIRSTS)
def test_gathering(first, causal):
    layout = LAYOUTS[first // 36 % 4 + 1]
    index, inputs = made(layout, first, causal)
    stop = until(index, layout.seq_len, layout.seq_len - 5) if first % 24 else None
    request = {"backend": "gather", "return_lse": True, "mass_block": 8}
    want = attend(*inputs, index, row_stop=stop, **request)
    there = [x.to(DEVICE) for x in inputs]
    moved, stop_there = index.to(DEVICE), None if stop is None else stop.to(DEVICE)
    got = attend(*there, moved, row_stop=stop_there, **request)
    plain = attend(*there, moved, row_stop=stop_there, backend="gather")
    for mine, right in ((got.out, want.out), (plain.out, want.out), (got.lse, want.lse),
                        (got.mass, want.mass)):  # fmt: skip
        assert mine.device == DEVICE
        torch.testing.assert_close(mine.cpu(), right, atol=1e-5, rtol=1e-5)
    again = block_mass(
        *there[:2], moved, got.lse, mass_block=8, row_stop=stop_there, backend="gather"
    )
    torch.testing.assert_close(again.cpu(), want.mass, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("first", FIRSTS)
def test_what_flex_is_given(first, causal):
    """Its lists and sorted tensors; FlexAttention itself must compile for a device."""
    index, inputs = made(LAYOUTS[2], first, causal)
    rows = RowIntervals(stop=until(index, LAYOUTS[2].seq_len, 5))
    rows = rows if index.rows is None else index.rows.meet(rows)
    moved = index.to(DEVICE)
    for made_here, right in (
        (lists_of(moved, 64), lists_of(index, 64)),
        (_call(*[x.to(DEVICE) for x in inputs], moved, rows.to(DEVICE)),
         _call(*inputs, index, rows)),
    ):  # fmt: skip
        for field, want in vars(right).items():
            if isinstance(want, torch.Tensor):
                got = getattr(made_here, field)
                assert got.device == DEVICE
                torch.testing.assert_close(got.cpu(), want)


def test_heads_with_nan_are_computed_dense():
    _, inputs = made(TokenLayout.video(2, 4, 6), 0)
    out = torch.zeros_like(inputs[0])
    out[0, 1, 3] = torch.nan
    want = finite_or_dense(out.clone(), *inputs, None, None)
    there = [x.to(DEVICE) for x in (out, *inputs)]
    got = finite_or_dense(*there, None, None)
    torch.testing.assert_close(got.cpu(), want)


def test_what_an_index_tells():
    index, _ = made(TokenLayout.video(2, 4, 6), 6)
    moved = index.to(DEVICE)
    assert moved.density == pytest.approx(index.density) and moved.is_dense == index.is_dense
    causal, _ = made(TokenLayout.video(2, 4, 6), 6, causal=True)
    assert causal.to(DEVICE).density == pytest.approx(causal.density)


@pytest.mark.parametrize("together", [1, 3, 6])
@pytest.mark.parametrize("kv_heads, frames", [(6, 5), (2, 1)])
def test_heads_recorded_together_are_what_they_are_alone(monkeypatch, kv_heads, frames, together):
    """Both kinds of runs, with text, padding, a bias on the logits, and an output projection."""
    layout = TokenLayout.video(frames, 9, 12, text_before=3, text_after=4)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v, bias = (drawn(2, layout.seq_len, h, 8) for h in (6, kv_heads, kv_heads, 1))
    bias = None if kv_heads == 2 else bias[..., 0, 0]
    stop = torch.tensor([layout.seq_len, layout.seq_len - 2])
    projections = {"layer": drawn(6, 8, 8)}
    context = StepContext(layout, 0.5, run=0, step=0)
    profiles = []
    for device in (torch.device("cpu"), DEVICE):
        there = [None if x is None else x.to(device) for x in (q, k, v, stop, bias)]
        call = AttentionCall(
            "layer", *there[:3], None, there[3], None, context, None, lambda x=there[0]: x, there[4]
        )
        part = ComponentProfile("Model", "hash", {"layer": (6, 8)})
        for phase in ("find", "score"):
            recorder = Recorder(part, phase, 16, 0, projections=projections)
            recorder(call)
            recorder.keep()
        profiles.append(part)
        most = max(len(cell_table(layout, tile).tokens) for tile in tilings(layout))
        monkeypatch.setattr(sampling, "MEMORY", together * sampling.LIVE * 4 * 16 * most * 8)
    alone, other = profiles
    assert list(alone.found) == list(other.found) == list(alone.scores) == list(other.scores)
    for values in (alone, other):
        assert torch.stack([x.square().sum() for x in values.pictures.values()]).all()
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(other.found, alone.found, **close)
    torch.testing.assert_close(other.looks, alone.looks, **close)
    torch.testing.assert_close(other.pictures, alone.pictures, **close)
    torch.testing.assert_close(other.scores, alone.scores, **close)


@pytest.mark.filterwarnings("ignore")  # of the host, once for each generation
def test_a_whole_search(monkeypatch, short_model):
    """Profile, sensitivity, choice, verification and check of the embedded model, its text encoder too."""
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    monkeypatch.setattr(Stopwatch, "seconds", 1e-3)  # this device has no events
    stub_costs(monkeypatch)
    pipe = load_pipeline(short_model, "cpu", "float32").to(DEVICE)
    settings = GenerationSettings(64, 64, 9, steps=1, guidance=3.0)
    prompts, held_out = ["a blue square moves right slowly"], ["a red circle moves left slowly"]
    options = {"held_out": held_out, "profile_steps": 1, "rows": 8, "max_error": 0.4}
    plan = search_plan(pipe, prompts, settings=settings, **options).plan
    assert 0 < plan.density < 1 and plan.measured["psnr_db"] > 10
    assert next(pipe.transformer.parameters()).device == DEVICE
    assert check_plan(pipe, plan, Case(held_out[0], 1), settings, rows=8).heads
