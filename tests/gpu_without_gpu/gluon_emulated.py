"""The Gluon kernel's source in a stand-in for Gluon, on the CPU, against the reference in float64.

`test_gluon.py` runs this in a process of its own, as other heads and pooled keys take Triton's interpreter,
which must be chosen before kernels are imported. Everything, in some minutes:

    TRITON_INTERPRET=1 python -m pytest tests/gpu_without_gpu/gluon_emulated.py
"""

import contextlib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from sparse_dit.attention import attend
from sparse_dit.backends import gluon, selfcheck
from sparse_dit.backends.gluon import launch, work
from sparse_dit.backends.gluon.config import configs_for
from sparse_dit.backends.triton import interpreted
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.intervals import RowIntervals
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from tests.gpu_without_gpu import triton_bfloat16, triton_nested
from tests.gpu_without_gpu.gluon_emulator import emulated, pool, source_of_kernel
from tests.helpers import contract_cases
from tests.helpers.contiguous_cases import FRAMES, LAYOUT, PATTERNS, patterns_index, random_entry
from tests.helpers.kernel_cases import (
    assert_close,
    assert_close_pooled,
    entry,
    in_order,
    one_head,
    qkv,
    split,
    until,
)

if not interpreted():
    pytest.skip("TRITON_INTERPRET=1 must be set", allow_module_level=True)
triton_bfloat16.install()
triton_nested.install()
SCATTERED = Pattern(Window(0, 1, 1), (2, 2, 2))
HALF = (torch.bfloat16, torch.float16)
REQUEST = {"backend": "gluon", "return_lse": True}


@pytest.fixture(autouse=True)
def take_all(monkeypatch):
    """Small indices too, where steps are half empty; and keys are pooled without an interpreter."""
    monkeypatch.setattr(work, "MORE_WORK", math.inf)
    monkeypatch.setattr(launch.gathering, "pool", pool)


@contextlib.contextmanager
def tiles_of(large):
    """Small tiles or large ones, whatever costs less."""

    def configs(dim, **kind):
        return configs_for(dim, **kind)[large:][:1]

    with mock.patch.object(work, "configs_for", configs):
        yield


def cells_alone(tokens, size=3):
    """All rows see everything pooled, and one key."""
    cells = list(range(0, tokens + 1, size))
    groups = split(tokens, 64)
    every = [range(len(cells) - 1)] * len(groups)
    return entry(tokens, groups, [[5]] * len(groups), cells=cells, pooled=every)


def check(index, dim=64, dtype=torch.bfloat16, seed=0, batch=1, kv_heads=1, **keywords):
    """Run an index, and compare; how many blocks of the kernel ran."""
    far = any(e.far is not None for e in index.entries)
    inputs = qkv(index, dim, batch=batch, kv_heads=kv_heads, dtype=dtype, size=0.5 if far else 1.5)
    with emulated(seed) as launcher:
        ours = attend(*inputs, index, **REQUEST, **keywords)
    if far:
        assert_close_pooled(ours, inputs, index, **keywords)
    else:
        assert_close(ours, inputs, index, rounds_weights=True, **keywords)
    return launcher.programs


@pytest.mark.parametrize(
    ("heads", "dim", "dtype"),
    [
        ((0, 1, 6, 7), 64, torch.bfloat16),
        ((5, 1, 0, 6), 128, torch.float16),
        ((2, 4), 128, torch.bfloat16),
        ((3, 0), 64, torch.float16),
    ],
    ids=str,
)
def test_patterns(heads, dim, dtype):
    """Key heads are shared, ends ragged; a head and rows see nothing but text."""
    assert check(patterns_index(*heads), dim, dtype, kv_heads=len(heads) // 2) > 0


@pytest.mark.parametrize("seed", range(4))
def test_random_lists(seed):
    """Runs of any length, tokens in other order, pooled keys, rows that see nothing."""
    e = random_entry(420, seed, moved=seed % 2 > 0, far=seed > 1)
    assert check(one_head(e), 64, HALF[seed % 2], seed) >= 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(4, 40))
def test_more_random_lists(seed):
    e = random_entry(500, seed, moved=seed % 2 > 0, far=seed % 3 > 0, block=60 + seed * 3)
    index = one_head(e, 2)
    if seed % 4 == 1:
        index = in_order(index, seed % 3 - 1)
    stop = until(index, 500, 500 - seed * 7) if seed % 4 == 2 else None
    check(index, (64, 128)[seed % 2], HALF[seed // 2 % 2], seed, 2, row_stop=stop)


@pytest.mark.parametrize("heads", [(0, 5), (2, 3)], ids=str)
def test_the_index_s_own_intervals(heads):
    index = in_order(patterns_index(*heads), -2)  # the first rows see nothing
    assert check(index, 64, torch.float16, 1) > 0


@pytest.mark.parametrize(("heads", "left"), [((0, 1), False), ((0, 3), False), ((1, 2), True)])
def test_intervals_of_the_call(heads, left):
    """Padding on either side, other lengths for each item, one of which is empty."""
    index = patterns_index(*heads)
    stop = until(index, 300, 0, 391)
    start = torch.zeros_like(stop) + 130 if left else None
    check(index, 64, torch.bfloat16, 2, 3, row_start=start, row_stop=stop)


def test_both_intervals_and_a_negative_scale():
    index = in_order(patterns_index(0, 5))
    check(index, 128, torch.float16, 3, 2, row_stop=until(index, 390, 200), scale=-0.1)


def test_heads_that_are_gathered_are_computed_in_the_same_call(monkeypatch):
    index = build_index([SCATTERED, PATTERNS[2], SCATTERED, PATTERNS[0]], LAYOUT)
    found = work.work_of(index, 2, 64, masked=False)
    assert found.others is not None and len(found.tiles)
    check(index, kv_heads=2)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("large", [False, True])
def test_small_and_large_tiles(dim, large):
    """Either configuration, whatever costs less."""
    index = SparseIndex((random_entry(300, 5, far=True), random_entry(300, 6)), (0, 1))
    with tiles_of(large):
        check(index, dim, seed=4)
        check(in_order(index), dim, seed=5)


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16)], ids=str)
def test_the_check_before_first_use_passes(dim, dtype, monkeypatch):
    if dim == 64:
        monkeypatch.undo()  # by the kernel that pools
    with emulated() as launcher:
        found = selfcheck.examine(gluon, "cpu", dim, dtype)
    assert found.problem is None and found.error > 0 and launcher.programs > 50


@pytest.fixture
def contract(monkeypatch):
    """The checks of `contract_cases.py` over tiles that lie side by side."""
    layout = TokenLayout.video(2, 5, 8, text_after=5)
    patterns = [Pattern(Window(frames=0), FRAMES), Pattern(Window(frames=0), FRAMES, far=True),
                Pattern(Dense()), Pattern(Skip(), FRAMES)]  # fmt: skip

    def index_of(*, causal=False):
        index = build_index(patterns, layout)
        return in_order(index) if causal else index

    def inputs(dtype, batch=2):
        return qkv(index_of(), 64, batch=batch, kv_heads=2, dtype=dtype)

    for name, value in (("LAYOUT", layout), ("PATTERNS", patterns), ("TOKENS", layout.seq_len),
                        ("index_of", index_of), ("inputs", inputs)):  # fmt: skip
        monkeypatch.setattr(contract_cases, name, value)
    with emulated() as launcher:
        yield contract_cases
    assert launcher.programs


def test_padding_may_hold_anything(contract):
    contract.check_padding("gluon", torch.bfloat16)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter of block mass
def test_nan_shows_where_it_is_seen(contract):
    contract.check_nan("gluon", torch.float16)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_in_causal_order(contract):
    contract.check_nan("gluon", torch.bfloat16, causal=True, odd=("keys",))


def test_any_strides(contract):
    contract.check_strides("gluon", torch.bfloat16)


def test_no_batch_items_and_modes(contract):
    contract.check_empty("gluon", torch.bfloat16)
    contract.check_modes("gluon", torch.float16)


# what is changed in the kernel's source; each must be found
FAULTS = {
    "keys are overwritten before they are used": (
        "        mbarrier.wait(k_empty.index(i), phase ^ 1)\n", ""),
    "values are overwritten before they are used": (
        "        mbarrier.wait(v_empty.index(i), phase ^ 1)\n", ""),
    "the producer waits for the other phase": (
        "mbarrier.wait(v_empty.index(i), phase ^ 1)", "mbarrier.wait(v_empty.index(i), phase)"),
    "the phase stays": ("phase = ((j - low) // STAGES) & 1\n", "phase = 0\n"),
    "queries aren't waited for": ("    mbarrier.wait(q_filled, 0)\n", ""),
    "keys aren't waited for": ("        mbarrier.wait(k_filled.index(i), phase)\n", ""),
    "values aren't waited for": (
        "        mbarrier.wait(v_filled.index(before), before_phase)\n", ""),
    "the last values aren't waited for": (
        "    mbarrier.wait(v_filled.index(last % STAGES), (last // STAGES) & 1)\n", ""),
    "values are given back in flight": (
        "    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])\n"
        "    mbarrier.arrive(v_empty.index(before), count=1)\n",
        "    mbarrier.arrive(v_empty.index(before), count=1)\n"
        "    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])\n"),
    "scores are read in flight": ("num_outstanding=1, deps=[s]", "num_outstanding=2, deps=[s]"),
    "values of the step are taken": (
        "before, before_phase = (j - 1 - low) % STAGES", "before, before_phase = (j - low) % STAGES"),
    "one consumer gives back for both": ("init(k_empty.index(i), count=CONSUMERS)",
                                         "init(k_empty.index(i), count=1)"),
    "a load expects other bytes": ("CONSUMERS * ROWS * D * 2)", "CONSUMERS * ROWS * D)"),
    "sums aren't rescaled": (
        "    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]\n", ""),
    "values that no row sees stay": ("gl.where(there[:, None], x, 0.0)", "x"),
    "cleaned values aren't seen by products": (
        "    fence_async_shared()\n    if CONSUMERS", "    if CONSUMERS"),
    "the other's share isn't waited for": ("        mbarrier.wait(cleaned, turn & 1)\n", ""),
    "turns of cleaning are miscounted": ("wait(cleaned, turn & 1)", "wait(cleaned, turn & 1 ^ 1)"),
    "consumers clean the same share": ("slice(WHICH * SHARE, SHARE)", "slice(0, SHARE)"),
    "shares look at the first keys": (
        "column = BEGIN + gl.arange(0, COUNT", "column = gl.arange(0, COUNT"),
    "bits are read from the first word": ("+ column // 32)", ")"),
    "a row that sees nothing yet": (
        'floor = gl.where(m_new == float("-inf"), 0.0, m_new)', "floor = m_new"),
    "a step more is taken for whole": ("key <= shortest - BLOCK_N", "key <= shortest"),
    "padding on the left is forgotten": ("gl.where(latest > 0, 0, whole)", "whole"),
    "pooled values are those of the first item": (
        "[batch + b, 0, pooled + key, 0]", "[batch, 0, pooled + key, 0]"),
    "pooled values are keys": ("[batch + b, 0, pooled + key, 0]", "[b, 0, pooled + key, 0]"),
    "pooled keys weigh as one": (
        "s = s * scale + gl.cast(bias, gl.float32, bitcast=True)[None, :]", "s = s * scale"),
    "masked pooled keys weigh as one": ("        s += bias[None, :]\n", "        pass\n"),
    "pooled keys are seen in part": ("(late[None, :] < stop[:, None])", "(early[None, :] < stop[:, None])"),
    "query heads are key heads": ("kv_head = head // kv_group", "kv_head = head"),
    "rows of the next tile are written": ("mask=(row < rows)[:, None]", "mask=(row < ROWS * 2)[:, None]"),
}  # fmt: skip


class Call(NamedTuple):
    """A small call.

    Args:
        index: What it computes.
        large: Whether its tiles are large.
        batch, keywords: As of `check`.
        odd: Keys of the first item that are made NaN.
    """

    index: SparseIndex
    large: bool
    batch: int = 1
    keywords: Mapping[str, torch.Tensor] = MappingProxyType({})
    odd: slice = slice(0)


def calls():
    """Together they come by every line of the kernel."""
    some, far = random_entry(420, 2, block=130), random_entry(420, 3, far=True)
    yield Call(SparseIndex((some, far), (0, 1, 0, 1)), True, 2)
    yield Call(one_head(cells_alone(420)), False)
    yield Call(
        in_order(SparseIndex((random_entry(300, 4, far=True), random_entry(300, 5)), (0, 1))), False
    )
    index = patterns_index(0, 4)
    stop = until(index, 300, 391)
    yield Call(index, True, 2, {"row_stop": stop}, slice(300, None))
    start = torch.zeros_like(stop) + 130
    yield Call(index, False, 2, {"row_stop": stop, "row_start": start})
    window = RowIntervals((torch.arange(392) - 100).clamp_min(0).int(), None)
    yield Call(SparseIndex(index.entries, (0, 1), window), False)


def holds(source):
    """Whether all of them are right."""
    for call in calls():
        heads = call.index.num_heads
        inputs = qkv(
            call.index,
            64,
            batch=call.batch,
            kv_heads=heads // 2 or 1,
            dtype=torch.bfloat16,
            size=0.5,
        )
        given = [x.clone() for x in inputs]
        for x in given[1:]:
            x[0, :, call.odd] = math.nan
        try:
            with emulated(0, source), tiles_of(call.large):
                ours = attend(*given, call.index, **REQUEST, **call.keywords)
            assert_close_pooled(ours, inputs, call.index, **call.keywords)
        except AssertionError:
            return False
    return True


def test_the_calls_that_find_faults_find_none():
    assert holds(source_of_kernel())


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    source, (old, new) = source_of_kernel(), FAULTS[fault]
    assert old in source
    assert not holds(source.replace(old, new))
