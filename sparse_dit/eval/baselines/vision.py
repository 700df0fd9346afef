"""Published rules for a VLM's prefill, beside those of `text`; one number sets the density."""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import AttentionCall
from ...entry import PatternIndex
from ...estimate.parts import by_rows, part_entry
from ...estimate.rows import BIN, CallRows, call_rows, sample_rows
from ...estimate.runs import slash_entries
from ...index import SparseIndex, dense_entry
from ...intervals import causal_rows
from ...modalities import Modalities
from ...patterns import Budget, ByQuery, Grid, VerticalSlash
from .text import MASSES, TextRule, for_all_heads, heads_first, scale_of

SAMPLED = 64  # rows of images that classify a head


def _mminference(beta: float) -> ByQuery:
    budget = Budget(beta=beta, least=BIN)
    grid = Grid(rows="last", sampled=64, budget=budget)
    return ByQuery(VerticalSlash("last", 64, budget), grid, grid)


def _blindsight(call: AttentionCall, share: float) -> SparseIndex:
    q, k = heads_first(call)
    heads, tokens = q.shape[1], q.shape[2]
    dense, rows = dense_entry(tokens, tokens), causal_rows(tokens, tokens, 0)
    where = next(iter(call.context.modalities), None)
    if where is None or not where.media:
        return SparseIndex((dense,), (0,) * heads, rows)
    if "blindsight" not in where.cache:  # the same for all layers
        where.cache["blindsight"] = _classes(where, call_rows(tokens, tokens, None), dense)
    entries = (dense, *where.cache["blindsight"])
    classes = blindsight_classes(q[0], k[0], where, share, scale_of(call))
    return SparseIndex(entries, tuple(classes.tolist()), rows)


def _classes(where: Modalities, every: CallRows, dense: PatternIndex) -> list[PatternIndex]:
    """What rows of images see as sink, intra-image, and intra-image and sink heads; text sees all."""
    n, text = every.num_keys, (where.kinds() == 0).long()
    stop, first = torch.arange(1, n + 1), sink_keys(where)
    own, both = (part_entry(where, every, stop, keys) for keys in (first[:0], first))
    columns = torch.zeros(n, dtype=torch.bool).index_fill_(0, first, True)
    near = torch.arange(-(-n // BIN)) == 0
    (sink,) = slash_entries(torch.cat([columns, near])[None], n, n)
    return [by_rows([entry, dense], text) for entry in (sink, own, both)]


def sink_keys(where: Modalities) -> Tensor:
    """The first token of the prompt and of every image, frame and stretch of text, int64 `[S]`."""
    return torch.tensor([part.start for part in where.parts])


def blindsight_classes(
    q: Tensor, k: Tensor, where: Modalities, share: float, scale: float
) -> Tensor:
    """The class of each head, int64 `[H]`: 0 dense, 1 sink, 2 intra-image, 3 intra-image and sink.

    It is the sparsest class whose keys hold a share of the probability of some rows of images.

    Args:
        q: `[H, N, D]`.
        k: `[num_kv_heads, N, D]`.
        where: Where images and videos lie.
        share: The least share.
        scale: Factor of the logits.
    """
    n = q.shape[1]
    edge = torch.tensor([part.start for part in where.parts] + [n])
    images = call_rows(n, n, None).of(where.kinds() > 0)
    rows = sample_rows(images, "spread", SAMPLED).rows[0].long()
    key, part = torch.arange(n), torch.searchsorted(edge, rows, right=True) - 1
    own = (key >= edge[part, None]) & (key < edge[part + 1, None])
    sink = torch.zeros(n, dtype=torch.bool).index_fill_(0, sink_keys(where), True)
    kinds = torch.stack([sink.expand_as(own) | (key == rows[:, None]), own, own | sink])
    classes = torch.zeros(len(q), dtype=torch.int64)
    for head in range(len(q)):
        logits = q[head, rows].float() @ k[head * len(k) // len(q)].float().T * scale
        p = logits.masked_fill_(key > rows[:, None], -torch.inf).softmax(-1).cpu()
        held = (p * kinds).sum(-1).mean(-1) >= share
        if held.any():
            classes[head] = 1 + int(held.long().argmax())
    return classes


VISION_RULES: dict[str, TextRule] = {
    "mminference": TextRule(
        "MMInference, arXiv 2504.16083: rows of images and videos see lines over their grids, rows of text "
        "columns and diagonals, each by 64 last rows of their own; the same for all heads, where the paper "
        "searches a pattern and a boundary for each",
        for_all_heads(_mminference),
    ),
    "blindsight": TextRule(
        "BlindSight, arXiv 2507.09071: rows of images see the first token of each image, their own, both or "
        "all, by class of the head; classes by a share of this prompt's own probability, where the paper "
        "takes those of a data set",
        _blindsight,
        MASSES,
    ),
}
