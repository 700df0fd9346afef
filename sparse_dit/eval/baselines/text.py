"""Published rules for a language model's prefill, the same for all heads; one number sets the density.

They are compositions of the shapes in `patterns/estimated.py` where they can be. Where ours depart from the
papers is said at each rule; in all of them the kernel sees groups of 64 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...call import AttentionCall
from ...estimate import estimated_index
from ...estimate.pooled import block_means
from ...estimate.rows import BIN, call_rows, sample_rows
from ...estimate.sums import sampled_sums
from ...index import SparseIndex
from ...patterns import Budget, Pattern, PooledBlocks, SinkWindow, VerticalSlash
from ...patterns.estimated import Shape, Share
from ...search.language.costs import index_of
from .antidiagonal import antidiagonal_index

SHARES = (0.01, 0.02, 0.035, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45)  # keys a row for each key
MASSES = (0.2, 0.4, 0.6, 0.75, 0.85, 0.9, 0.95, 0.98, 0.995)  # of the probability, or of a score
LAST = 128  # rows that FlexPrefill samples
TAU = 0.1  # FlexPrefill's: below this distance a head's pooled blocks are trusted


@dataclass(frozen=True)
class TextRule:
    """A rule.

    Args:
        source: What it is, with its paper.
        index: What it computes of a call, for a number out of `numbers`.
        numbers: Its parameter's values that are tried; the density rises with them.
    """

    source: str
    index: Callable[[AttentionCall, float], SparseIndex]
    numbers: Sequence[float] = SHARES


def for_all_heads(
    shape: Callable[[float], Shape],
) -> Callable[[AttentionCall, float], SparseIndex]:
    """What a call computes if all heads have one shape, which follows from a number."""

    def index(call: AttentionCall, number: float) -> SparseIndex:
        return index_of(call, [Pattern(shape(number))] * call.q.shape[2])

    return index


def heads_first(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """q `[B, H, N, D]` and k `[B, num_kv_heads, M, D]` of a call."""
    return call.q.transpose(1, 2), call.k.transpose(1, 2)


def scale_of(call: AttentionCall) -> float:
    """The factor of a call's logits."""
    return call.q.shape[-1] ** -0.5 if call.scale is None else call.scale


def _xattention(stride: int) -> Callable[[AttentionCall, float], SparseIndex]:
    def index(call: AttentionCall, threshold: float) -> SparseIndex:
        q, k = heads_first(call)
        return antidiagonal_index(q, k, stride=stride, threshold=threshold, scale=scale_of(call))

    return index


def _flexprefill(call: AttentionCall, gamma: float) -> SparseIndex:
    q, k = heads_first(call)
    blocks = PooledBlocks(Share(gamma, BIN), sinks=BIN)
    lines = VerticalSlash("last", LAST, Share(gamma, BIN), sinks=BIN)
    distances = pooled_distance(q, k, scale_of(call))
    shapes = [blocks if distance < TAU else lines for distance in distances.tolist()]
    return estimated_index(q, k, shapes, scale=call.scale)


def pooled_distance(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """How far pooled blocks are from what the last rows see, `[H]`.

    It is the square root of the Jensen-Shannon divergence.

    Args:
        q: `[1, H, N, D]`.
        k: `[1, num_kv_heads, N, D]`.
        scale: Factor of the logits.
    """
    heads, tokens = q.shape[1], q.shape[2]
    rows = sample_rows(call_rows(tokens, tokens, None), "last", LAST)
    seen = sampled_sums(q, k, rows, scale=scale).columns[0]  # [H, N]
    seen = torch.nn.functional.pad(seen, (0, -tokens % BIN)).unflatten(1, (-1, BIN)).sum(-1)
    asks = q[0, :, -LAST:].float().mean(1)  # [H, D]
    keys = block_means(k)[0].repeat_interleave(heads // k.shape[1], 0)  # [H, G, D]
    told = ((keys @ asks[:, :, None])[..., 0] * scale).softmax(-1).cpu()
    seen = seen / seen.sum(-1, keepdim=True).clamp_min(1e-20)
    middle = (seen + told) / 2
    parts = [torch.xlogy(p, p / middle.clamp_min(1e-20)).sum(-1) for p in (seen, told)]
    return torch.stack(parts).mean(0).clamp_min(0).sqrt()


RULES: dict[str, TextRule] = {
    "streaming-llm": TextRule(
        "StreamingLLM, arXiv 2309.17453: 4 first keys and a window; in MInference the A-shape",
        for_all_heads(lambda beta: SinkWindow(4, Budget(beta=beta, least=BIN))),
    ),
    "moa-uniform": TextRule(
        "MoA, arXiv 2406.14909, one rule for all heads: 64 first keys and a window that grows with the "
        "length; the paper chooses a rule for each head",
        for_all_heads(lambda beta: SinkWindow(BIN, Budget(beta=beta, least=2 * BIN))),
    ),
    "minference": TextRule(
        "MInference, arXiv 2407.02490: columns and diagonals by the last 64 rows, 30 first keys and 100 "
        "behind a row always; one budget for both by gain over cost, where the paper has a number of each",
        for_all_heads(
            lambda beta: VerticalSlash("last", 64, Budget(beta=beta, least=BIN), 30, 100)
        ),
    ),
    "flexprefill": TextRule(
        "FlexPrefill, arXiv 2502.20766: a share gamma of the last 128 rows' probability in columns and in "
        "diagonals, or pooled blocks where those are near it (tau 0.1); at least 64 keys a row, not 1,024, "
        "and pooled blocks by the share of each row, not of all",
        _flexprefill,
        MASSES,
    ),
    "xattention-8": TextRule(
        "XAttention, arXiv 2503.16428: blocks with a share of the antidiagonals' score, stride 8",
        _xattention(8),
        MASSES,
    ),
    "xattention-16": TextRule("The same, stride 16", _xattention(16), MASSES),
    "vertical-slash": TextRule(
        "ours, the same for all heads: columns and diagonals by the last and spread rows",
        for_all_heads(lambda beta: VerticalSlash(budget=Budget(beta=beta, least=BIN))),
    ),
}
