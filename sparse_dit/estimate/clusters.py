"""Clusters of a head's queries and keys by k-means, and what each of them sees; see `patterns/cluster.py`.

Letters in shapes: B batch, H heads, N tokens, D channels, C clusters, E channels of all batch items, G groups
of query rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..entry import FarField, PatternIndex
from ..index import dense_entry, runs_of
from ..layout import TokenLayout, cut_offsets, tile_order
from ..on_cpu import on_cpu
from ..patterns import Cluster, Pattern, Share
from .blocks import GROUP
from .blockwise import Estimate
from .budget import fewest, within
from .scores import MOST_LOGITS

FEWEST_KEYS = 16  # in a cluster, on average; of queries a group
FIRST, AGAIN = 50, 2  # iterations of k-means: from tokens, and from the centroids of before; SVG2's


class Clusters(NamedTuple):
    """What k-means found.

    Args:
        labels: int64 `[N]`.
        centroids: float32 `[C, E]`: means of the clusters; of one that lost all tokens, as before.
    """

    labels: Tensor
    centroids: Tensor


class Centroids(NamedTuple):
    """What a head's next clusters start from: those of queries and of keys, `[C, E]`."""

    q: Tensor
    k: Tensor


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Which tokens are clustered, int64; those that aren't are seen by all.

    Args:
        queries: Tokens of the grid; the rows of all others see everything.
        keys: Those of them that are no sinks.
        others: Tokens outside of the grid.
        sinks: Keys that are in no cluster.
    """

    queries: Tensor
    keys: Tensor
    others: Tensor
    sinks: Tensor


@on_cpu
@torch.no_grad()
def cluster_entries(
    q: Tensor,
    k: Tensor,
    patterns: Mapping[int, Pattern],
    layout: TokenLayout,
    scale: float,
    known: dict[int, Centroids],
) -> dict[int, Estimate]:
    """What each listed head sees, by clusters of its own queries and keys.

    Args:
        q: `[B, H, N, D]`, any strides.
        k: `[B, num_kv_heads, N, D]`, any strides; H must be a multiple of `num_kv_heads`.
        patterns: By head: of clusters.
        layout: Where the N tokens lie.
        scale: Factor of the logits.
        known: By head the centroids to start from; those that are found are put there.
    """
    found: dict[int, Estimate] = {}
    of_keys: dict[tuple[int, int], Clusters] = {}
    group, n = q.shape[1] // k.shape[1], layout.seq_len
    for head, pattern in patterns.items():
        shape: Cluster = pattern.shape
        tokens = _tokens(layout, pattern.sink_frames)
        rows, columns = _of_head(q, head, tokens.queries), _of_head(k, head // group, tokens.keys)
        if not (rows.isfinite().all() and columns.isfinite().all()):
            found[head] = Estimate(dense_entry(n, n), False, 1.0)
            known.pop(head, None)
            continue
        if not len(columns):  # all of them are sinks
            found[head] = Estimate(dense_entry(n, n), True, 1.0)
            continue
        start = known.get(head)
        key = head // group, shape.keys
        if key not in of_keys:
            count = min(shape.keys, -(-len(columns) // FEWEST_KEYS))
            of_keys[key] = clustered(columns, count, start and start.k)
        mine = clustered(rows, min(shape.queries, -(-len(rows) // GROUP)), start and start.q)
        known[head] = Centroids(mine.centroids, of_keys[key].centroids)
        found[head] = _estimate(mine, of_keys[key], pattern, tokens, q.shape[0], scale)
    return found


def clustered(x: Tensor, count: int, start: Tensor | None = None) -> Clusters:
    """Lloyd's k-means of `[N, E]`, float32; Euclidean.

    Args:
        x: What is clustered.
        count: How many clusters, at most N.
        start: The centroids to go on from; if None, those of tokens evenly spread, and more iterations.
    """
    turns, centroids = AGAIN, start
    if centroids is None or centroids.shape != (count, x.shape[1]):
        turns, centroids = FIRST, x[torch.arange(count) * len(x) // count]
    labels: Tensor | None = None
    for _ in range(turns):
        before, labels = labels, nearest(x, centroids)
        if before is not None and torch.equal(before, labels):
            break
        sizes = torch.bincount(labels, minlength=count)[:, None]
        total = torch.zeros_like(centroids).index_add_(0, labels, x)
        centroids = torch.where(sizes > 0, total / sizes.clamp_min(1), centroids)
    assert labels is not None, "there is at least one turn"
    return Clusters(labels, centroids)


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The number of the nearest centroid to each row of `[N, E]`, int64 `[N]`."""
    offset = centroids.square().sum(1) / -2
    step = max(1, MOST_LOGITS // len(centroids))
    return torch.cat([torch.addmm(offset, part, centroids.T).argmax(1) for part in x.split(step)])


def _tokens(layout: TokenLayout, sink_frames: int) -> _Tokens:
    order = tile_order(layout, (1, None, None))
    first = order.global_before
    grid = order.order[first : first + layout.num_grid]
    others = torch.cat([order.order[:first], order.order[first + layout.num_grid :]])
    free = order.coordinates[:, 0] >= sink_frames
    return _Tokens(grid, grid[free], others, torch.cat([others, grid[~free]]))


def _of_head(x: Tensor, head: int, tokens: Tensor) -> Tensor:
    """float32 `[N, E]`: what a head has of some tokens, of all batch items."""
    return x[:, head].cpu()[:, tokens].float().transpose(0, 1).flatten(1)


def _estimate(
    rows: Clusters, columns: Clusters, pattern: Pattern, tokens: _Tokens, batch: int, scale: float
) -> Estimate:
    """One head's entry."""
    q_sizes, k_sizes = (
        torch.bincount(x.labels, minlength=len(x.centroids)) for x in (rows, columns)
    )
    q_there, k_there = q_sizes > 0, k_sizes > 0
    q_sizes, k_sizes = q_sizes[q_there], k_sizes[k_there]
    q, k = (
        x.centroids[there].unflatten(1, (batch, -1)).transpose(0, 1)
        for x, there in ((rows, q_there), (columns, k_there))
    )  # [B, C, D]
    p = torch.softmax(q @ k.transpose(1, 2) * scale + k_sizes.log(), -1).mean(0)
    keep = _chosen(p, k_sizes, pattern.shape)
    recall = (torch.where(keep, p, 0).sum(1) * q_sizes).sum() / q_sizes.sum()
    return Estimate(
        _entry(
            keep,
            (_bounds(q_sizes), _bounds(k_sizes)),
            tokens.queries[rows.labels.argsort(dim=0, stable=True)],
            tokens.keys[columns.labels.argsort(dim=0, stable=True)],
            tokens,
            pattern.far,
        ),
        True,
        float(recall),
    )


def _chosen(p: Tensor, sizes: Tensor, shape: Cluster) -> Tensor:
    """Bool `[Cq, Ck]`: what is seen exactly, by the probability of clusters of keys."""
    count = len(sizes)
    rank = p.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    keep = rank < round(shape.least * count)
    if isinstance(shape.keep, Share):
        return keep | fewest(p, p, shape.keep.gamma)
    none = torch.zeros(count, dtype=torch.bool)
    return keep | within(p / sizes, sizes, none, shape.keep.keys(int(sizes.sum())))


def _bounds(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def _entry(
    keep: Tensor,
    bounds: tuple[Tensor, Tensor],
    queries: Tensor,
    keys: Tensor,
    tokens: _Tokens,
    far: bool,
) -> PatternIndex:
    """The entry in which clusters of rows see clusters of keys, bool `[Cq, Ck]`, and sinks."""
    n = len(queries) + len(tokens.others)
    q_bounds, k_bounds = bounds
    cuts = cut_offsets(q_bounds, GROUP)
    owner = torch.searchsorted(q_bounds, cuts[:-1], right=True) - 1
    apart = torch.arange(len(queries), n, GROUP)  # rows that see everything
    offsets = torch.cat([cuts[:-1], apart, torch.tensor([n])])
    always = int(len(tokens.sinks) > 0)
    exact = torch.nn.functional.pad(keep, (0, always, 0, 1), value=True)[
        torch.nn.functional.pad(owner, (0, len(apart)), value=len(keep))
    ]
    ends = torch.cat([k_bounds, torch.tensor([n] * always, dtype=torch.int64)])
    row, first, last = runs_of(exact)
    runs = torch.stack([ends[first], ends[last] - ends[first]], 1).int()
    pooled = None
    if far:
        row_far, first, last = runs_of(~exact[:, : len(k_bounds) - 1])
        cells = torch.stack([first, last - first], 1).int()
        pooled = FarField(k_bounds.int(), _offsets(row_far, len(exact)), cells)
    return PatternIndex(
        n,
        n,
        torch.cat([queries, tokens.others]).int(),
        torch.cat([keys, tokens.sinks]).int(),
        offsets.int(),
        _offsets(row, len(exact)),
        runs,
        pooled,
    )


def _offsets(row: Tensor, count: int) -> Tensor:
    """int32 `[count + 1]`: where each row's runs begin."""
    return _bounds(torch.bincount(row, minlength=count)).int()
