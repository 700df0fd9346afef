"""Blocks that are chosen and laid out by the kernels, in Triton's interpreter, against lists from the host.

`test_triton.py` runs this in a process of its own: the interpreter must be chosen before the kernels are
imported.
"""

import ctypes
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparse_dit.backends import triton
from sparse_dit.backends.reference import token_mask
from sparse_dit.backends.triton import check, frames, grids, laid
from sparse_dit.backends.triton.chosen import ChosenIndex
from sparse_dit.backends.triton.config import Config
from sparse_dit.backends.triton.laid import chosen_work
from sparse_dit.backends.triton.tables import TILE_BITS
from sparse_dit.estimate.blockwise import blockwise_entries
from sparse_dit.estimate.on_device import blocks_on_device
from sparse_dit.index import build_index, index_of
from sparse_dit.intervals import RowIntervals
from sparse_dit.patterns import Antidiagonal, Budget, Dense, Pattern, Pooled, Share, Skip, Window
from sparse_dit.runtime import Runtime
from tests.estimate.cases import tensors
from tests.estimate.test_blockwise import LAYOUTS, PATTERNS
from tests.test_online import MASS, OWN, POOLED, SMALL
from tests.test_reuse import LAYOUT, call_at, component, dense

if not triton.interpreted():
    pytest.skip("TRITON_INTERPRET=1 must be set", allow_module_level=True)
CONFIGS = (Config(64, 16, 4, 1), Config(128, 16, 4, 1))
UNKNOWN = 2**31 - 1  # of steps that are packed from small pieces
NEAR = Pattern(Window(0, 1, 1), (1, 2, 2), far=True)


def read(address, length):
    """So many int32 at an address."""
    return torch.from_numpy(
        np.ctypeslib.as_array((ctypes.c_int32 * length).from_address(address)).copy()
    )


def seen(work, head, n, cells):
    """What the tables of a head say, bool `[N, N]` and `[N, C]`; a pair that comes twice is an error."""
    items = [i & ((1 << TILE_BITS) - 1) for i in work.order.tolist() if i >> TILE_BITS == head]
    assert sorted(items) == list(range(len(items)))
    tiles, queries, keys, steps, far, far_steps, _, _, lasts = work.heads[head].tolist()
    block = work.config.block_n
    exact, pooled = torch.zeros(n, n, dtype=torch.int64), torch.zeros(n, cells, dtype=torch.int64)
    q_tokens = read(queries, n)
    for tile in read(tiles, len(items) * 8).view(-1, 8).tolist():
        first, rows, low, middle, high, far_low, far_high, _ = tile
        assert 0 < rows <= work.config.block_m and low <= middle <= high
        mine = q_tokens[first : first + rows].long()[:, None]
        told = read(lasts + 4 * low, middle - low) if lasts else torch.zeros(0)
        assert (told.diff() >= 0).all(), (
            "the kernel counts the first that end before an interval does"
        )
        for number, place in enumerate(read(steps + 4 * low, high - low).tolist()):
            tokens = read(keys + 4 * place, block)
            assert number >= middle - low or (tokens >= 0).all()
            if number < len(told):
                assert told[number] == tokens.max() or (grids.PACKED and told[number] == UNKNOWN)
            exact[mine, tokens[tokens >= 0].long()] += 1
        for place in read(far_steps + 4 * far_low, far_high - far_low).tolist():
            numbers = read(far + 4 * place, block)
            pooled[mine, numbers[numbers >= 0].long()] += 1
    assert exact.max() <= 1 and (not cells or pooled.max() <= 1)
    return exact.bool(), pooled.bool()


@pytest.mark.parametrize("packed", [grids.PACKED, 0], ids=["packed", "apart"])
@pytest.mark.parametrize("layout", ["ragged", "text", "one"])
@pytest.mark.parametrize("name", PATTERNS)
def test_tables_say_what_the_lists_of_the_host_say(name, layout, packed, monkeypatch):
    monkeypatch.setattr(grids, "PACKED", packed)
    monkeypatch.setattr(laid, "CHUNK", 8)  # more than one of them
    grids.grid_of.cache_clear()
    frames.frame_of.cache_clear()
    pattern, size = PATTERNS[name], LAYOUTS[layout]
    q, k = tensors(size.seq_len, size.seq_len, heads=4, kv_heads=2)
    patterns = {0: pattern, 2: replace(pattern, tile=(1, 2, 8))}
    there = blocks_on_device(q, k, patterns, size, 0.3).seen
    entries = {h: e.entry for h, e in blockwise_entries(q, k, patterns, size, 0.3).items()}
    entries[1], entries[3] = build_index([Pattern(Skip()), NEAR], size).entries
    index = ChosenIndex((there[0], entries[1], there[2], entries[3]), q.device)
    for by_group, intervals in ((False, False), (True, False), (False, True)):
        work = chosen_work(index, k, *CONFIGS, intervals=intervals, by_group=by_group)
        assert all((work.heads[head, 8] > 0) >= intervals for head in (0, 2))
        for head, entry in entries.items():
            want, far = token_mask(entry)
            cells = 0 if entry.far is None else len(entry.far.cell_offsets) - 1
            exact, pooled = seen(work, head, size.seq_len, cells)
            assert torch.equal(exact, want)
            assert far is None or torch.equal(pooled, far)
    assert float(index.density) == pytest.approx(index_of(entries).density, abs=1e-12)


def wide(call):
    """The call with channels enough for the kernels."""
    q, k, v = (torch.cat([x, x.flip(1)], -1) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, stock=lambda: dense(q, k, v))


def both(*patterns):
    """A runtime of the kernels, and one of the host."""
    made = component(*patterns)
    return Runtime("transformer", made, "triton"), Runtime("transformer", made, "cpu")


ANTIDIAGONAL = Pattern(Antidiagonal(Share(0.6, 1), stride=2), tile=SMALL, far=True)
NOTHING, ALL = Budget(beta=0.0, least=1), Budget(beta=1.0)
CALLS = {
    "pooled": [POOLED, Pattern(Dense()), replace(POOLED, tile=(2, 2, 2))],
    "taken again": [POOLED, ANTIDIAGONAL, replace(POOLED, every=2)],
    "own order": [OWN] * 3,
    "mass": [MASS, replace(MASS, shape=replace(MASS.shape, refresh=2, adaptive=True)), POOLED],
    "nothing and all": [Pattern(Pooled(NOTHING), SMALL), Pattern(Pooled(ALL), SMALL), POOLED],
    "all": [Pattern(Pooled(ALL), SMALL, far=True)] * 3,
}


@pytest.mark.parametrize("patterns", CALLS.values(), ids=CALLS)
def test_calls_give_what_the_host_gives(patterns):
    """Outputs, and the account of what was computed, over steps that find blocks and steps that keep them."""
    ours, host = both(*patterns)
    for step in range(3):
        call = wide(call_at(step))
        torch.testing.assert_close(ours(call), host(call), rtol=1e-4, atol=1e-5)
    for mine, want in zip(ours.ran, host.ran, strict=True):
        assert mine.computed == pytest.approx(want.computed, rel=1e-9)
        assert (mine.calls, mine.dense_because) == (want.calls, want.dense_because)
        assert mine.backend == (want.backend and "triton")
    if patterns is not CALLS["all"]:
        (found,) = ours._estimates._runs[0].kept.values()
        assert isinstance(found.index, ChosenIndex), "not the host's way"


def test_rows_may_have_intervals():
    ours, host = both(POOLED, POOLED, ANTIDIAGONAL)
    call = wide(call_at(0, batch=2))
    stop = torch.tensor([20, LAYOUT.seq_len], dtype=torch.int32)[:, None].expand(2, LAYOUT.seq_len)
    call = replace(call, rows=RowIntervals(None, stop))
    torch.testing.assert_close(ours(call), host(call), rtol=1e-4, atol=1e-5)


def test_heads_with_nan_are_dense_and_that_is_said_when_it_is_asked(caplog):
    ours, _ = both(*[POOLED] * 3)
    call = wide(call_at(0))
    call.q[0, 5, 1, 0] = float("nan")
    want = dense(call.q, call.k, call.v)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = ours(call)
        assert not caplog.records
        assert any("aren't finite" in note for note in ours.notes)
        ours.forget()
    assert len(caplog.records) == 1
    torch.testing.assert_close(out[:, :, 1], want[:, :, 1], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not torch.allclose(out[:, :, 0], want[:, :, 0], atol=1e-3)


def test_what_is_kept_is_small(monkeypatch):
    """Bits, and tables as long as they take little beside k and v."""
    ours, _ = both(*[POOLED] * 3)
    call = wide(call_at(0))
    for fits in (False, True):
        monkeypatch.setattr(laid, "KEPT", 1e9 if fits else 0.02)
        ours.forget()
        ours(call)
        ours(wide(call_at(1)))
        (found,) = ours._estimates._runs[0].kept.values()
        bits = sum(head.bits.nbytes for head in found.seen.values())
        assert (ours.kept_bytes > bits) == fits
        assert fits or ours.kept_bytes <= 0.02 * (call.k.nbytes + call.v.nbytes)


def test_tables_are_checked_before_their_first_use(monkeypatch, caplog):
    made = (torch.device("cpu"), 16, torch.float32)
    assert check.is_right.__wrapped__(*made)
    monkeypatch.setattr(laid, "_bits", lambda head: head.bits ^ 1)
    with caplog.at_level(logging.WARNING):
        assert not check.is_right.__wrapped__(*made)
    assert "blocks are chosen on the host" in caplog.text
