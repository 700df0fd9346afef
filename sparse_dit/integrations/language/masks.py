"""Reads the row intervals out of a mask: the keys that each query may see, first to last.

Causal order, padding on either side, sliding windows, packed sequences, chunks and prefixes all are one
interval a row; see `sparse_dit.intervals`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...intervals import RowIntervals

ROWS = 256  # read at a time, so that what is made of them stays in the cache


def intervals_of(mask: Tensor, num_queries: int, num_keys: int) -> RowIntervals | str | None:
    """What a mask says, read once; it waits for the mask's device.

    Args:
        mask: bool (True: seen) or float (0: seen, the dtype's least or -inf: not seen), `[B, 1, N, M]`, of
            which any axis may be 1.
        num_queries, num_keys: N and M.

    Returns:
        int32 `[B or 1, N]` bounds; None if each row sees every key; a text where rows aren't intervals.
    """
    what = f"a mask {tuple(mask.shape)} of {mask.dtype}"
    fits = mask.ndim == 4 and mask.shape[2] in (1, num_queries) and mask.shape[3] in (1, num_keys)
    if not fits:
        return what
    if mask.shape[1] != 1:
        return f"{what}, another one for each head"
    mask = mask.expand(-1, -1, num_queries, num_keys)[:, 0]
    starts, counts, whole = [], [], []
    for part in mask.split(ROWS, 1):
        seen = part if part.dtype == torch.bool else part == 0
        if part.dtype != torch.bool:
            whole.append((seen | (part <= torch.finfo(part.dtype).min / 2)).all())
        start, count = _first(seen), seen.sum(-1, dtype=torch.int32)
        starts.append(start)
        counts.append(count)
        whole.append(_no_holes(seen))
    start, count = torch.cat(starts, 1), torch.cat(counts, 1)
    facts = torch.stack([torch.stack(whole).all(), (count == num_keys).all()]).tolist()
    if not facts[0]:
        return f"{what} that isn't one interval of keys for each query"
    return None if facts[1] else RowIntervals(start, start + count)


def _first(seen: Tensor) -> Tensor:
    """The first key that each row sees, int32; 0 where it sees none."""
    return seen.to(torch.uint8).argmax(-1).int()


def _no_holes(seen: Tensor) -> Tensor:
    """Whether each row's keys are one interval."""
    rises = (seen[..., 1:] & ~seen[..., :-1]).sum(-1, dtype=torch.int32)
    return (rises + seen[..., 0] <= 1).all()
