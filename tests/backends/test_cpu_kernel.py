"""The native CPU kernel against the float64 reference: every variant, dtype, pattern and size."""

import pytest
import torch

from sparse_dit.attention import attend, block_mass
from sparse_dit.backends.cpu import library
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.kernel_cases import (
    DTYPES,
    assert_close,
    dense,
    entry,
    in_order,
    one_head,
    pattern_case,
    qkv,
    relative,
    split,
    until,
)

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))
DIMS = (8, 16, 24, 40, 64, 72, 80, 96, 128, 136, 192, 256, 512)


def check(index, inputs, variant=None, truth=None, **keywords):
    """Runs the kernel with LSE, and with mass if asked for, and compares."""
    q = inputs[0]
    ours = attend(*inputs, index, backend="cpu", return_lse=True, **keywords)
    variant = variant or library.LIBRARY.running
    rounds = "bf16" in variant and q.dtype == torch.bfloat16
    assert_close(ours, inputs, index, truth=truth, rounds_weights=rounds, **keywords)
    return ours


def scattered(seed, n, m, size, share=0.3, **keywords):
    """Groups of `size` rows that see keys at random; the first sees nothing, the last everything."""
    generator = torch.Generator().manual_seed(seed)
    groups = split(n, size)
    keys = [(torch.rand(m, generator=generator) < share).nonzero()[:, 0] for _ in groups]
    keys[0] = keys[0][:0]
    keys[-1] = torch.arange(m)
    return entry(m, groups, keys, **keywords)


def orders(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator) for n in lengths]


def far_entry(n=90, m=110, size=16, permuted=True):
    """Cells of different sizes from key 7 on (an empty one too), seen exactly, pooled, or not."""
    cells = [7, 8, 20, 20, 45, 61, 62, 90, m]
    groups = split(n, size)
    generator = torch.Generator().manual_seed(5)
    keys, pooled = [], []
    for _ in groups:
        role = torch.randint(0, 3, (len(cells) - 1,), generator=generator)
        seen = [range(cells[c], cells[c + 1]) for c in range(len(role)) if role[c] == 1]
        keys.append([*range(0, 7, 2), *(key for run in seen for key in run)])
        pooled.append((role == 2).nonzero()[:, 0])
    q_order, k_order = orders(1, n, m) if permuted else (None, None)
    return entry(m, groups, keys, q_order=q_order, k_order=k_order, cells=cells, pooled=pooled)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_every_pattern(variant, layout, causal):
    for first in range(0, len(PATTERN_CASES), 6):
        for padded in (False, True):
            case = pattern_case(layout, causal, first, padded)
            for dtype in DTYPES:
                inputs = [x.to(dtype) for x in case.inputs]
                keywords = {"row_stop": case.row_stop, "mass_block": 16}
                check(case.index, inputs, variant, case.truth, **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(variant, dtype, dim):
    q_order, k_order = orders(dim, 77, 101)
    entries = (scattered(dim, 77, 101, 16, q_order=q_order, k_order=k_order), dense(77, 101))
    index = SparseIndex(entries, (0, 1, 1, 0))
    check(index, qkv(index, dim, batch=2, kv_heads=2, dtype=dtype, seed=dim), variant)


@pytest.mark.parametrize("size", [1, 2, 8, 15, 16, 17, 32, 33, 48, 64, 100, 127, 128])
def test_group_sizes(variant, size):
    index = one_head(scattered(size, 200, 150, size))
    for dtype in DTYPES:
        check(index, qkv(index, 40, dtype=dtype), variant, mass_block=64)


@pytest.mark.parametrize("group", [1, 16, 32, 50, 64, 128])
def test_groups_of_build_index(variant, group):
    layout = TokenLayout.video(5, 6, 7, text_before=9, text_after=20)
    patterns = [
        Pattern(Window(0, 2, 2), (2, 4, 4), far=True),
        Pattern(Dense()),
        Pattern(Skip()),
        Pattern(Window(1, 1, None), (None, 2, 2), cell=3, far=True, sink_frames=1),
    ]
    index = build_index(patterns, layout, group=group)
    check(index, qkv(index, 64), variant, mass_block=64)


@pytest.mark.parametrize("n", [1, 2, 7, 127, 128, 129, 300])
@pytest.mark.parametrize("m", [1, 3, 63, 64, 65, 200])
def test_lengths(variant, n, m):
    """One dense group of any length, and the same in groups of 64."""
    for e in (dense(n, m), dense(n, m, 64)):
        index = one_head(e, heads=2)
        check(index, qkv(index, 16, kv_heads=1), variant, mass_block=32)


RUNS = {
    "one key": [[0], [100], [199]],
    "columns": [range(0, 200, 2), range(1, 200, 7), range(0, 200, 199)],
    "blocks": [range(64), [*range(64, 128), *range(192, 200)], range(128, 192)],
    "blocks off the grid": [range(5, 69), range(1, 200), [*range(3, 66), *range(67, 131)]],
    "runs around a tile": [range(63), range(65), [*range(31), *range(32, 65), 80]],
    "nothing, everything": [[], range(200), []],
}


@pytest.mark.parametrize("runs", RUNS)
def test_runs_of_any_length(variant, runs):
    for k_order in (None, *orders(3, 200)):
        index = one_head(entry(200, [64, 17, 30], RUNS[runs], k_order=k_order))
        for dtype in DTYPES:
            check(index, qkv(index, 24, dtype=dtype), variant, mass_block=50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_padding(variant, dtype, permuted):
    """Each number of valid keys, in one call."""
    e = far_entry(n=40, m=110, permuted=permuted)
    index = SparseIndex((e, dense(40, 110, 32)), (0, 1))
    lengths = [0, 1, 2, 6, 7, 8, 9, 19, 44, 46, 63, 64, 65, 109, 110]
    inputs = qkv(index, 16, batch=len(lengths), dtype=dtype)
    ours = check(index, inputs, variant, row_stop=until(index, *lengths), mass_block=16)
    assert (ours.out[0] == 0).all() and ours.lse[0].isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [-200, -89, -30, -1, 0, 1, 20, 109, 500, 2**31 - 1, -(2**31)])
def test_causal(variant, dtype, offset):
    entries = (far_entry(), far_entry(permuted=False), dense(90, 110))
    index = in_order(SparseIndex(entries, (0, 1, 2)), offset)
    ours = check(
        index, qkv(index, 16, batch=2, dtype=dtype), variant,
        row_stop=until(index, 110, 60), mass_block=16,
    )  # fmt: skip
    blind = max(0, min(90, -offset))
    assert (ours.out[:, :, :blind] == 0).all() and ours.lse[:, :, :blind].isneginf().all()


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_heads(variant, kv_heads):
    """Every key head's queries, with patterns mixed over them, skipped heads among them."""
    entries = (far_entry(), dense(90, 110), entry(110, [90], [[]]))
    index = SparseIndex(entries, (0, 1, 2, 0, 2, 1))
    ours = check(index, qkv(index, 8, batch=3, kv_heads=kv_heads), variant, mass_block=100)
    assert (ours.out[:, [2, 4]] == 0).all() and ours.lse[:, [2, 4]].isneginf().all()


@pytest.mark.parametrize("mass_block", [1, 7, 16, 64, 100, 110, 111, 5000])
@pytest.mark.parametrize("causal", [False, True])
def test_mass_blocks(variant, mass_block, causal):
    entries = (far_entry(), dense(90, 110), scattered(1, 90, 110, 40))
    index = SparseIndex(entries, (0, 1, 2))
    index = in_order(index) if causal else index
    for dtype in DTYPES:
        inputs = qkv(index, 16, batch=2, dtype=dtype)
        keywords = {"row_stop": until(index, 110, 71), "mass_block": mass_block}
        check(index, inputs, variant, **keywords)


@pytest.mark.parametrize("mass_block", [1, 16, 64, 5000])
def test_mass_from_a_cached_lse(variant, mass_block):
    entries = (far_entry(), dense(90, 110), scattered(1, 90, 110, 40), dense(90, 110, 16))
    for causal in (False, True):
        index = SparseIndex(entries, (0, 1, 2, 3))
        index = in_order(index, -3) if causal else index
        for dtype in DTYPES:
            q, k, v = qkv(index, 24, batch=2, kv_heads=2, dtype=dtype, size=2.5)
            keywords = {"row_stop": until(index, 110, 71), "mass_block": mass_block}
            want = attend(
                *(x.double() for x in (q, k, v)), index,
                backend="reference", return_lse=True, **keywords,
            )  # fmt: skip
            mass = block_mass(q, k, index, want.lse, backend="cpu", **keywords)
            bound = 2 * relative(q, k, index=index, lse=want.lse).max()
            assert mass.shape == want.mass.shape
            assert ((mass - want.mass).abs() <= bound * want.mass + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_long(dtype, dim):
    """Sums over thousands of keys, full mantissas."""
    n = 2048
    entries = (dense(n, n), scattered(2, n, n, 64, share=0.2))
    index = SparseIndex(entries, (0, 1))
    inputs = [x.to(dtype) for x in qkv(index, dim)]
    inputs = [(x.float() * 1.0123).to(dtype) for x in inputs]
    check(index, inputs, mass_block=64)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, -0.5])
def test_any_scale(variant, scale):
    index = SparseIndex((far_entry(), dense(90, 110)), (0, 1))
    for dtype in DTYPES:
        check(index, qkv(index, 16, dtype=dtype), variant, scale=scale, mass_block=64)


def test_results_are_what_was_asked_for():
    index = one_head(dense(20, 30), heads=2)
    q, k, v = qkv(index, 8)
    ours = attend(q, k, v, index, backend="cpu")
    assert ours.lse is None and ours.mass is None
    ours = attend(q, k, v, index, backend="cpu", mass_block=16)
    assert ours.lse is None and ours.mass.shape == (1, 2, 1, 2)
    both = attend(q, k, v, index, backend="cpu", return_lse=True, mass_block=16)
    assert torch.equal(both.out, ours.out) and both.lse.dtype == torch.float32


def test_entries_without_a_head(variant):
    index = SparseIndex((far_entry(), dense(90, 110), dense(90, 110, 16)), (1, 1))
    check(index, qkv(index, 16), variant)
