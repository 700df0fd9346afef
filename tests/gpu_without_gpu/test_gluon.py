"""The Gluon backend without its kernel: tables, which heads it takes, refusals, the host; and the kernel's
source in a stand-in for Gluon, in a child process."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_dit.attention import AUTO, attend, sparse_attention
from sparse_dit.backends import gluon, triton
from sparse_dit.backends.gluon.config import CONFIGS
from sparse_dit.backends.gluon.tables import tables_of
from sparse_dit.backends.gluon.work import Work, choice_of, work_of
from sparse_dit.backends.reference import token_mask
from sparse_dit.backends.triton.tables import TILE_BITS
from sparse_dit.index import build_index
from sparse_dit.intervals import RowIntervals, causal_rows
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from tests.gpu_without_gpu.test_triton import WAN, busy
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.contiguous_cases import LAYOUT, PATTERNS, patterns_index, random_entry
from tests.helpers.kernel_cases import dense, one_head, qkv

ROOT = Path(__file__).parents[2]
NO_TRITON = pytest.mark.skipif(triton._absent(), reason="triton isn't installed")
ENTRIES = [
    *patterns_index().entries,
    *(random_entry(500, seed, moved=seed % 2 > 0, far=seed % 3 > 0) for seed in range(8)),
    dense(130, 257),
]


def seen(e, tables, block, within=None):
    """How often tables compute what, `[N, M]` and `[N, C]`; checks that kinds of steps are right."""
    cells = 0 if e.far is None else len(e.far.cell_offsets) - 1
    exact = torch.zeros(e.num_queries, e.num_keys, dtype=torch.int64)
    pooled = torch.zeros(e.num_queries, cells, dtype=torch.int64)
    bits = (tables.masks[:, :, None] >> torch.arange(32)) & 1
    start, stop = (torch.zeros(e.num_queries), torch.full((e.num_queries,), e.num_keys))
    if within is not None:
        start, stop = within.bounds(e.num_keys, e.num_queries)
        start, stop = (x.expand(1, e.num_queries)[0] for x in (start, stop))
    for first, rows, low, middle, masked, high in tables.tiles.tolist():
        query = torch.arange(first, first + rows)
        assert rows > 0 and low <= middle <= masked <= high and high > low
        key, kind = tables.steps[low:high].long().unbind(1)
        far, mask = kind % 2, kind // 2
        assert not far[: middle - low].any() and far[middle - low : masked - low].all()
        assert (mask[: masked - low] == 0).all() and (key[: middle - low].diff() > 0).all()
        for i in range(high - low):
            mine = key[i] + bits[mask[i]].flatten().nonzero()[:, 0]
            table = pooled if far[i] else exact
            assert len(mine) == 0 or mine[-1] < table.shape[1]
            table[query[:, None], mine] += 1
            if i < middle - low:
                assert (start[query] <= key[i]).all() and (key[i] + block <= stop[query]).all()
    return exact, pooled


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("rows", [64, 128])
def test_tables_say_what_the_index_says(block, rows):
    for e in ENTRIES:
        tables = tables_of(e, rows, block)
        assert tables is not None
        exact, pooled = seen(e, tables, block)
        want, far = token_mask(e)
        assert torch.equal(exact, want.long())
        assert far is None or torch.equal(pooled, far.long())
        assert tables is tables_of(e, rows, block), "made once"


@pytest.mark.parametrize("left", [False, True])
def test_steps_outside_of_the_index_s_intervals_are_left_out(left):
    for e in ENTRIES:
        n, m = e.num_queries, e.num_keys
        rows = causal_rows(n, m, m - n)
        if left:
            begin = (torch.arange(n) - 150).clamp_min(0)
            rows = RowIntervals(begin.int(), rows.stop * (torch.arange(n) != 5).int())
        tables = tables_of(e, 128, 64, rows)
        exact, pooled = seen(e, tables, 64, rows)
        start, stop = (x.expand(1, n)[0] for x in rows.bounds(m, n))
        key = torch.arange(m)
        inside = (key >= start[:, None]) & (key < stop[:, None])
        want, far = token_mask(e)
        assert exact.max() <= 1 and torch.equal(exact.bool() & inside, want & inside)
        assert exact[want & ~inside].sum() < (want & ~inside).sum(), "some are left out"
        assert far is None or torch.equal(pooled, far.long())


def test_steps_are_as_few_as_can_be():
    """Short runs share a step, and a run needs none that one before it covers."""
    e = random_entry(500, 3)
    for block in (64, 128):
        tables = tables_of(e, 128, block)
        for first, _, low, _, _, high in tables.tiles.tolist():
            needed, keys = 0, token_mask(e)[0][first].nonzero()[:, 0].tolist()
            end = -1
            for key in keys:
                needed, end = (needed + 1, key + block) if key >= end else (needed, end)
            assert high - low == max(1, needed)


def test_scattered_tokens_and_keys_are_not_taken():
    none = [p for p in PATTERN_CASES if p.tile[0] == 2 and not isinstance(p.shape, Dense | Skip)]
    for layout in LAYOUTS:
        for e in build_index(none, layout).entries:
            assert e.q_order is None or tables_of(e, 64, 64) is None
    columns = build_index([Pattern(Window(frames=0), (1, 8, 6))], LAYOUT)
    assert choice_of(columns, 64, masked=False).tables == (None,)
    with pytest.raises(NotImplementedError, match="sm_90"):
        sparse_attention(*qkv(columns, 64), columns, backend="gluon")


def test_which_heads_are_taken_is_decided_with_the_index():
    """By the work that both kernels would have; the others are the gathering kernel's, in the same call."""
    scattered = Pattern(Window(0, 1, 1), (2, 2, 2), far=True)
    layout = TokenLayout.video(4, 16, 16, text_after=5)
    index = build_index([PATTERNS[2], scattered, PATTERNS[0], scattered], layout)
    choice = choice_of(index, 64, masked=False)
    assert [t is None for t in choice.tables] == [False, True, False]
    work = work_of(index, 2, 64, masked=False)
    assert work is work_of(index, 2, 64, masked=False)
    assert sorted(set(work.tiles[:, 0].tolist())) == [0, 2]
    assert sorted(set((work.others.order >> TILE_BITS).tolist())) == [1, 3]
    assert work_of(build_index(PATTERNS[:5], layout), 1, 64, masked=False).others is None
    tiny = one_head(random_entry(500, 1, block=40))  # steps would be half empty
    assert choice_of(tiny, 128, masked=False).tables == (None,)


def test_heads_are_taken_whose_keys_fill_small_tiles_only():
    """With a little more work than where keys are gathered; large tiles would have too much."""
    index = build_index(
        [Pattern(Window(1, 8, 8), (1, 8, 8))], TokenLayout.video(4, 30, 52), sorted_by=(1, 8, 8)
    )
    for dim in CONFIGS:
        choice = choice_of(index, dim, masked=False)
        assert choice.tables[0] is not None and choice.config.block_m == 64


@pytest.mark.parametrize("gathered", [2, 6, 10])
def test_launches_of_both_kernels_one_behind_the_other_leave_little_idle(gathered):
    """What overlapping them would save of a call of Wan at 480p, by the speeds that are reckoned with."""
    whole = Pattern(Window(2, 12, 20), (1, 8, 8), far=True)
    heads = [whole] * (12 - gathered) + [replace(whole, tile=(4, 4, 4))] * gathered
    index = build_index(heads, WAN, sorted_by=whole.tile)
    work, choice = work_of(index, 12, 128, masked=False), choice_of(index, 128, masked=False)
    assert work.config.block_m == work.others.config.block_m == 64, "two blocks of either fit"
    ours, theirs = (
        (tables.cost / speed).sort(descending=True).values.tolist()
        for tables, speed in ((choice.tables[0], 0.9), (choice.gathering[1], 0.66))
    )
    ours, theirs, free = ours * (12 - gathered), theirs * gathered, [0.0] * 2 * 132
    first = busy(ours, free)
    in_turn = max(first) + max(busy(theirs, free))
    assert 0 < 1 - max(busy(theirs, first)) / in_turn < 0.015


def test_heads_with_most_work_are_launched_first():
    work = work_of(patterns_index(6, 0, 1), 3, 128, masked=False)
    heads = work.tiles[:, 0].tolist()
    assert heads == sorted(heads, key=[1, 2, 0].index)


def test_a_copied_index_makes_its_own_tables():
    index = patterns_index(2)
    work_of(index, 1, 64, masked=False)
    twin = copy.deepcopy(index)
    assert not any(isinstance(x, Work) for x in twin.cache.values())


def test_it_says_why_it_does_not_run():
    index = patterns_index(0)
    q, k, v = qkv(index, 64, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="it runs on NVIDIA's sm_90, but q is on cpu"):
        attend(q, k, v, index, backend="gluon")


def test_auto_does_not_take_it():
    assert "gluon" not in AUTO


@NO_TRITON
def test_refusals_on_such_a_gpu(monkeypatch):
    monkeypatch.setattr(gluon, "_on_hopper", lambda device: True)
    index = patterns_index(0)
    for dim in CONFIGS:
        assert gluon.unsupported(qkv(index, dim, dtype=torch.bfloat16)[0], index) is None
    for dim, dtype, words in ((64, torch.float32, "float16 and bfloat16, but q is torch.float32"),
                              (96, torch.float16, "head_dim must be 64 or 128, got 96")):  # fmt: skip
        assert words in gluon.unsupported(qkv(index, dim, dtype=dtype)[0], index)
    q = qkv(index, 64, dtype=torch.float16)[0]
    columns = build_index([Pattern(Window(frames=0), (1, 8, 6))], LAYOUT)
    assert "no head's tiles and keys lie side by side" in gluon.unsupported(q, columns)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "compiled graph" in gluon.unsupported(q, index)
    monkeypatch.undo()
    monkeypatch.setattr(gluon, "_on_hopper", lambda device: True)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    for name in [x for x in sys.modules if x.startswith("sparse_dit.backends.gluon.")]:
        monkeypatch.delitem(sys.modules, name)
    gluon._missing.cache_clear()
    assert "it needs Gluon, of triton 3.6 or later" in gluon.unsupported(q, index)
    gluon._missing.cache_clear()


@NO_TRITON
@pytest.mark.parametrize("name", ["plain", "far", "mixed"])
def test_a_call_makes_nothing_anew_and_copies_nothing(name, monkeypatch):
    from sparse_dit.backends.gluon import work
    from sparse_dit.backends.triton import tables
    from sparse_dit.bench.host import null_gpu
    from tests.gpu_without_gpu.test_triton_host import READS, Counted

    layout = TokenLayout.video(4, 16, 16, text_after=7)
    patterns = {"plain": [PATTERNS[0], PATTERNS[1]], "far": [PATTERNS[2]] * 2}
    patterns["mixed"] = [PATTERNS[0], Pattern(Window(0, 1, 1), (2, 4, 4))]
    index = build_index(patterns[name], layout)
    shape = (1, layout.seq_len, 2, 64)
    q, k, v = (torch.randn(shape, dtype=torch.float16).transpose(1, 2) for _ in range(3))
    with null_gpu(90) as gpu, torch.no_grad():
        sparse_attention(q, k, v, index, backend="gluon")
        first = [launch.kernel for launch in gpu.launches]
        gpu.launches.clear()
        for module, function in ((work, "_work"), (work, "_choice"), (tables, "_build")):
            monkeypatch.setattr(module, function, lambda *_, name=function, **__: pytest.fail(name))
        with Counted() as counted:
            out = sparse_attention(q, k, v, index, backend="gluon")
    want = ["pool"] * (name == "far") + ["gluon"] + ["attend"] * (name == "mixed")
    assert [launch.kernel for launch in gpu.launches] == first == want
    assert not READS & set(counted.names), counted.names
    given = gpu.launches[name == "far"].arguments
    assert given[0].data_ptr() == out.data_ptr()
    assert [x.base.data_ptr() for x in given[8:11]] == [x.data_ptr() for x in (q, k, v)]
    assert [list(x.shape) for x in given[8:11]] == [list(x.shape) for x in (q, k, v)]
    assert {x.padding for x in given[8:11]} == {"zero"}, "beyond the last token"


@NO_TRITON
def test_other_sizes_compile_nothing_anew(monkeypatch):
    from sparse_dit.backends.gluon import work
    from sparse_dit.backends.triton import bound
    from sparse_dit.bench.host import null_gpu
    from tests.gpu_without_gpu.test_triton_host import Forgetful

    with null_gpu(90) as gpu, torch.no_grad():
        monkeypatch.setattr(bound, "COMPILED", Forgetful())
        monkeypatch.setattr(work, "MORE_WORK", float("inf"))
        for size in ((2, 8, 16), (3, 16, 16), (5, 9, 31)):
            for text in (0, 1, 77):
                layout = TokenLayout.video(*size, text_after=text)
                index = build_index([Pattern(Window(frames=0), (1, None, None), far=True)], layout)
                inputs = qkv(index, 128, batch=1 + text % 2, dtype=torch.float16)
                sparse_attention(*inputs, index, backend="gluon")
    assert [name for name, _ in gpu.specialised].count("gluon") <= 2, "small and large tiles"


@NO_TRITON
def test_the_kernel_s_source_in_a_stand_in_for_gluon():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not exhaustive",
         "tests/gpu_without_gpu/gluon_emulated.py"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
