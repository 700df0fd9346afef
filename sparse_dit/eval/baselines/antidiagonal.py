"""XAttention's choice of blocks, by sums along antidiagonals: https://arxiv.org/abs/2503.16428.

Of every square of `stride` queries and keys the logits of one antidiagonal are summed; their softmax over the
keys of a row, summed over a block, is the block's score, and of each row of blocks the fewest with a share of
the score are computed, with the first block and the diagonal always. Here blocks are of 64 tokens, as the
kernel's groups of rows, not of 128; all heads have one threshold, where the paper also offers a search for
one a head.

Letters in shapes: H heads, N tokens, D channels, S stride, G blocks of 64 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...estimate.budget import fewest
from ...estimate.pooled import block_entries
from ...estimate.rows import BIN
from ...estimate.scores import antidiagonal_scores
from ...index import SparseIndex
from ...intervals import causal_rows


@torch.no_grad()
def antidiagonal_index(
    q: Tensor, k: Tensor, *, stride: int, threshold: float, scale: float
) -> SparseIndex:
    """An index for a causal prefill of one text, on the device of `q`.

    Args:
        q: `[1, H, N, D]`.
        k: `[1, num_kv_heads, N, D]`.
        stride: S; divides 64.
        threshold: The share of the score that is computed, 0 to 1.
        scale: Factor of the logits.
    """
    heads, tokens = q.shape[1], q.shape[2]
    blocks = -(-tokens // BIN)
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    forced = torch.eye(blocks, dtype=torch.bool) | (torch.arange(blocks) == 0)
    scores = torch.stack(
        [block_scores(q[0, h], k[0, h * k.shape[1] // heads], stride, scale) for h in range(heads)]
    ).cpu()
    chosen = (fewest(scores, scores, threshold) | forced) & causal
    entries = block_entries(chosen, tokens, tokens)
    index = SparseIndex(tuple(entries), tuple(range(heads)), causal_rows(tokens, tokens, 0))
    return index if q.is_cpu else index.to(q.device)


def block_scores(q: Tensor, k: Tensor, stride: int, scale: float) -> Tensor:
    """What the antidiagonals say of each pair of blocks, float32 `[G, G]`; a row sums to 1.

    Args:
        q, k: `[N, D]`.
        stride, scale: As for `antidiagonal_index`.
    """
    bounds = torch.arange(0, len(q) + BIN, BIN).clamp_max(len(q))
    return antidiagonal_scores(q, k, bounds, stride, scale, causal=True)
