"""The Triton backend as far as it goes without running a kernel; and the kernels, in a child process."""

import heapq
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_dit.attention import attend
from sparse_dit.backends import triton
from sparse_dit.backends.reference import token_mask
from sparse_dit.backends.triton.config import CAPABILITIES, CONFIGS, configs_for
from sparse_dit.backends.triton.grids import grid_of
from sparse_dit.backends.triton.tables import TILE_BITS, tables_of
from sparse_dit.backends.triton.work import launch_order
from sparse_dit.estimate.blocks import blocks_of
from sparse_dit.index import build_index
from sparse_dit.intervals import causal_rows
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Pooled, SlidingTile, Stripe, Window
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.kernel_cases import dense, one_head, qkv

ROOT = Path(__file__).parents[2]
SLOTS = {"A100, one block an SM": 108, "H100, one": 132, "H100, two": 264}
WAN = TokenLayout.video(21, 30, 52)
PLANS = {
    "mixed": [
        Pattern(Dense()),
        Pattern(Window(frames=1), (1, 6, 8)),
        Pattern(SlidingTile(3, 3, 3), (3, 6, 8)),
        Pattern(Stripe(time_width=1), (1, 6, 8), far=True),
        Pattern(Window(3, 8, 8), (4, 4, 4), far=True),
        Pattern(Stripe(space_width=(0, 3)), (None, 2, 4)),
    ]
    * 2,
    "sparse": [Pattern(Window(2, 6, 6), (4, 4, 4), far=True)] * 12,
}


def seen(tables, n, m):
    """What tables compute, bool `[N, M]` and `[N, C]`; a pair that comes twice is an error."""
    cells = max(len(tables.cell_offsets) - 1, 0)
    masks = torch.zeros(n, m, dtype=torch.int64), torch.zeros(n, cells, dtype=torch.int64)
    block = torch.arange(16)
    for row, rows, low, middle, high, far_low, far_high, _ in tables.tiles.tolist():
        queries = tables.q_tokens[row : row + rows].long()
        assert 0 < rows <= 64 and low <= middle <= high
        lists = ((tables.keys, tables.steps, low, high, masks[0]),
                 (tables.cells, tables.cell_steps, far_low, far_high, masks[1]))  # fmt: skip
        for table, steps, start, stop, mask in lists:
            places = steps[start:stop].long()[:, None] + block
            mine = table[places.clamp_max(len(table) - 1)].long()
            whole = (mine >= 0).all(1)
            if table is tables.keys:
                last = tables.lasts[start:stop]
                assert torch.equal(last, mine.amax(1).int()) and whole[: middle - low].all()
                assert (last[: middle - low].diff() > 0).all()
            assert places.numel() == 0 or places.max() < len(table)
            mine = mine[mine >= 0]
            mask[queries[:, None], mine] += 1
    assert all((mask <= 1).all() for mask in masks)
    return [mask.bool() for mask in masks]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tables_say_what_the_index_says(layout):
    n = layout.seq_len
    for pattern in PATTERN_CASES:
        e = build_index([pattern], layout, group=32).entries[0]
        want, far = token_mask(e)
        for by_group in (False, True):
            tables = tables_of(e, 64, 16, by_group=by_group)
            exact, pooled = seen(tables, n, n)
            assert torch.equal(exact, want)
            assert far is None or torch.equal(pooled, far)
            places = tables.keys >= 0
            tokens = e.key_tokens[tables.positions[places].long()]
            assert torch.equal(tables.keys[places].long(), tokens)


def test_causal_tables_leave_out_what_no_row_sees():
    e = dense(100, 120)
    token = torch.arange(120)
    tables = tables_of(e, 64, 16, rows=causal_rows(100, 120, 20))
    exact, _ = seen(tables, 100, 120)
    allowed = token <= torch.arange(100)[:, None] + 20
    assert (exact | ~allowed).all()
    assert exact.sum() == 64 * 96 + 36 * 120  # the first tile sees 84 keys, in 6 steps of 16
    first, _, low, middle, high = tables.tiles[1, :5].tolist()
    full = tables.keys[tables.steps[low:middle].long()[:, None] + torch.arange(16)]
    assert middle - low == (64 + 21) // 16 and full.max() <= first + 20 and high - middle <= 5


def test_equal_neighbours_become_one_tile():
    """Groups of 64 rows of one video tile see the same, and fill a tile of 128."""
    e = build_index([Pattern(Window(0, 1, 1), (2, 8, 8))], TokenLayout.video(4, 32, 32)).entries[0]
    assert e.num_groups == 64 and len(tables_of(e, 128, 64).tiles) == 32
    assert len(tables_of(e, 128, 64, by_group=True).tiles) == 64
    steps = tables_of(e, 128, 64).cost.sum() * 128 * 64
    assert steps < 1.3 * e.density * e.num_queries * e.num_keys


@pytest.mark.parametrize(
    ("tile", "most"),
    [((4, 4, 4), 1.01), ((None, 1, 3), 1.02), ((None, 3, 1), 1.02), ((1, 8, 8), 1.07)],
)
def test_blocks_laid_out_on_the_device_are_about_as_many_steps(tile, most):
    """As the host makes of the same blocks, in the token orders of `own_order`."""
    blocks = blocks_of(Pattern(Pooled(), tile=tile), WAN)
    count = blocks.num_blocks
    chosen = torch.rand(count, count, generator=torch.Generator().manual_seed(0)) < 0.25
    chosen[torch.arange(count) % 20 > 0] = False
    host = tables_of(blocks.entries(chosen[None])[0], 64, 64).tiles
    grid = grid_of(blocks.places, configs_for("sm90", 128)[0], False, torch.device("cpu"))
    small = chosen[:, grid.small_block.long()].sum(1)
    steps = chosen[:, grid.piece_block.long()].sum(1) + (small + 63) // 64
    assert 1 <= steps.sum() / (host[:, 4] - host[:, 2]).sum() < most


def busy(costs, free):
    """When slots are done that take the next tile as soon as they are free; `free` is when they first are."""
    free = list(free)
    heapq.heapify(free)
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return free


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("plan", PLANS)
def test_launches_keep_all_multiprocessors_busy(plan, slots):
    index = build_index(PLANS[plan], WAN)
    cost = [tables_of(e, 64, 64).cost for e in index.entries]
    costs = [cost[p] for p in index.head_to_pattern]
    order = launch_order(costs)
    assert sorted(order.tolist()) == [
        (h << TILE_BITS) + t for h, c in enumerate(costs) for t in range(len(c))
    ]
    listed = [costs[item >> TILE_BITS][item & ((1 << TILE_BITS) - 1)].item() for item in order]
    assert sum(listed) / (slots * max(busy(listed, [0.0] * slots))) > 0.97


def test_tables_are_made_once():
    index = build_index(PATTERN_CASES[:3], LAYOUTS[1])
    e = index.entries[1]
    assert tables_of(e, 64, 64) is tables_of(e, 64, 64)
    assert tables_of(e, 64, 64) is not tables_of(e, 128, 64)


def test_reasons(monkeypatch):
    index = one_head(dense(8, 8))
    inputs = qkv(index, 64, dtype=torch.float16)
    monkeypatch.setattr(triton, "_absent", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="runs on CUDA and ROCm GPUs, but q is on cpu"):
        attend(*inputs, index, backend="triton")
    assert "head_dim must be" in triton.unsupported(inputs[0][..., :12], index)
    assert "torch.float32" in triton.unsupported(inputs[0].float(), index)
    monkeypatch.setattr(triton, "_absent", lambda: True)
    assert triton.unsupported(inputs[0], index) == "the package triton isn't installed"


def test_every_architecture_has_blocks_for_every_head_dim():
    assert set(CAPABILITIES.values()) | {"gfx9"} == set(CONFIGS)
    for name in CONFIGS:
        for dim in triton.HEAD_DIMS:
            assert all(64 <= c.block_m <= 128 for c in configs_for(name, dim))
    with pytest.raises(ValueError, match="at most 128, got 136"):
        configs_for("sm90", 136)


@pytest.mark.skipif(triton._absent(), reason="triton isn't installed")
@pytest.mark.parametrize("name", ["triton_interpreted.py", "triton_chosen.py"])
def test_kernels_in_the_interpreter(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not exhaustive",
         f"tests/gpu_without_gpu/{name}"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
