"""Tokens in the order of clusters: those whose queries are alike see the clusters of keys that suit them.

SVG2 (https://arxiv.org/abs/2505.18875): k-means of a head's queries and of its keys, and of clusters of keys
those with most of the probability. Routing Transformer (2003.05997) has the idea, and is trained for it. The
numbers of clusters are SVG2's for Wan; sequences that are short for them have fewer, as kernels compute
blocks. SVG2's first centroids are drawn, ours are tokens evenly spread; batch items, of which SVG2 takes one,
share their clusters.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from .estimated import Budget, Fraction, Share
from .fields import CONFIG, Refresh

Number = Annotated[int, Field(strict=True, ge=1, le=1 << 14)]


@dataclass(frozen=True, config=CONFIG)
class Cluster:
    """For every cluster of queries the clusters of keys whose centroid suits its centroid the most.

    Global tokens, and the first frames if the pattern has sinks, are in no cluster.

    Args:
        keep: How much is seen exactly: a share of the estimated probability, or keys a row.
        queries, keys: How many clusters there are; but no more than one for 64 queries, or 16 keys.
        least: A cluster of queries sees at least this share of the clusters of keys.
        refresh: What is found is kept for so many steps; None: for the whole stage. What is found next
            goes on from its centroids.
    """

    keep: Share | Budget = Share(0.9, 1)
    queries: Number = 300
    keys: Number = 1000
    least: Fraction = 0.1
    refresh: Refresh = 1
