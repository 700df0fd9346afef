"""Whether tables that are written on a device are right there: checked once, before their first use."""

from __future__ import annotations

import functools
import logging

import torch

from ...index import SparseIndex, entry_of, groups_of
from ...layout import TokenLayout, tile_order
from ...on_cpu import on_cpu
from ..selfcheck import TOLERANCES
from . import forward
from .chosen import ChosenBlocks, ChosenIndex, Places

logger = logging.getLogger("sparse_dit")
LAYOUT = TokenLayout.video(5, 6, 8, text_before=7, text_after=70)
TILE = (4, 4, 4)  # whose blocks have 64, 32, 16 and 8 tokens here
HEADS = 2


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def is_right(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether blocks laid out on a device give what they give laid out on the host; else logged, once.

    It waits for the device. Its answer is kept for the process.
    """
    with device:
        q, k, v = (torch.randn(1, HEADS, LAYOUT.seq_len, head_dim).to(dtype) for _ in range(3))
    there, here = _indices(device)
    ours, want = (
        forward(q, k, v, index, None, head_dim**-0.5, False, None).out.float()
        for index in (there, here.to(device))
    )
    error = ((ours - want).norm() / want.norm()).item()
    if error <= TOLERANCES[dtype]:
        return True
    logger.warning(
        "blocks are chosen on the host, as tables written on %s are wrong: relative error %.2g, "
        "expected at most %.2g", device, error, TOLERANCES[dtype],
    )  # fmt: skip
    return False


@on_cpu
def _indices(device: torch.device) -> tuple[ChosenIndex, SparseIndex]:
    """The same blocks on the device and as lists on the CPU; every other head has a far field."""
    order = tile_order(LAYOUT, TILE)
    cells = order.cell_offsets(None)
    groups = groups_of(order, cells)
    count = len(cells) - 1
    chosen = torch.rand(HEADS, count, count, generator=torch.Generator().manual_seed(0)) < 0.4
    chosen[0, 0] = False
    bits = torch.nn.functional.pad(chosen, (0, -count % 8)).unflatten(-1, (-1, 8))
    bytes_ = (bits << torch.arange(8)).sum(-1).to(torch.uint8).to(device)
    bounds = cells + order.global_before
    places = [
        Places(order.order, bounds, groups.offsets, groups.owner, bounds if far else None)
        for far in (False, True)
    ]
    heads = tuple(ChosenBlocks(places[h % 2], bytes_[h]) for h in range(HEADS))
    entries = tuple(entry_of(chosen[h], order, cells, groups, bool(h % 2)) for h in range(HEADS))
    return ChosenIndex(heads, device), SparseIndex(entries, tuple(range(HEADS)))
