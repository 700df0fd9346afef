"""What heads of a diffusion language model see by published baselines that no plan can say.

Letters in shapes: H heads, N tokens, C blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...attend_call import attend_call, attended_call
from ...call import AttentionCall
from ...estimate.blocks import Blocks, blocks_of
from ...estimate.scores import mass_by_block, mass_stretch
from ...index import SparseIndex, index_of
from ...intervals import RowIntervals
from ...layout import TokenLayout
from ...patterns import Mass, Pattern


@dataclass(eq=False)
class Baseline:
    """The intercept of a rule that chooses blocks of keys at a block's first steps, or by their place.

    Args:
        keep: The share of the keys that is seen.
        chosen: Bool `[H, C, C]`: the blocks that each head sees, from a call.
        block: Tokens of a block.
        dense_above: Where more than this share is masked, calls run stock.

    Attributes:
        pairs, computed: Query-key pairs in all, and those that were computed.
        kept_bytes: Not counted.
    """

    keep: float
    chosen: Callable[[AttentionCall, Blocks, float], Tensor]
    block: int = 64
    dense_above: float = 1.0
    pairs: float = 0
    computed: float = 0.0
    kept_bytes: int = 0
    _kept: dict[str, tuple[object, SparseIndex]] = field(default_factory=dict)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention's output `[B, N, H, D]`."""
        context, n = call.context, call.q.shape[1]
        assert context.layout is not None and len(call.q) == 1, "one prompt of a known generation"
        pairs = call.q.shape[2] * n * call.k.shape[1]
        self.pairs += pairs
        if (context.sigma or 0.0) > self.dense_above:
            self.computed += pairs
            return call.stock()
        shape = (context.run, context.layout)
        kept = self._kept.get(call.layer)
        if kept is None or kept[0] != shape:
            blocks = blocks_of(Pattern(Mass(), tile=(1, 1, self.block)), TokenLayout.sequence(n))
            entries = blocks.entries(self.chosen(call, blocks, self.keep))
            kept = self._kept[call.layer] = (shape, index_of(dict(enumerate(entries))))
        self.computed += pairs * kept[1].density
        return attend_call(call, kept[1])[0]

    def time_making(self) -> None:
        """Not counted."""


def window(call: AttentionCall, blocks: Blocks, keep: float, sinks: int = 0) -> Tensor:
    """Blocks near a query's own on either side, and the first ones."""
    c = blocks.num_blocks
    place, reach = torch.arange(c), max(0.0, (keep * c - sinks - 1) / 2)
    near = (place[:, None] - place).abs() <= reach
    return (near | (place < sinks)).expand(call.q.shape[2], c, c)


def streaming_llm(call: AttentionCall, blocks: Blocks, keep: float) -> Tensor:
    """A window, and the first block, which holds the sinks."""
    return window(call, blocks, keep, sinks=1)


def sparsed_code(call: AttentionCall, blocks: Blocks, keep: float) -> Tensor:
    """What SparseD's released code chooses (github.com/INV-WZQ/SparseD, 52155b4), not its paper.

    Scores are divided by the root of the number of heads, not of head_dim. Blocks of the prompt are the best
    of all keys, of which those of generated tokens are dropped, so that fewer are left; generated ones are
    the best of their own. In a pipeline that writes block after block the mask is made for each of them. Its
    third departure, that guidance runs dense, needs guidance.
    """
    layout = call.context.layout
    assert layout is not None, "it is known here"
    scale, c, n = call.q.shape[2] ** -0.5, blocks.num_blocks, call.q.shape[1]
    prompt = layout.segments[0].length if len(layout.segments) > 1 else 0
    of_prompt = blocks.bounds[:-1] < prompt
    first = _best(_mass(call, blocks, scale, 0), int(c * keep) + 1) & of_prompt
    if prompt == n:
        return first
    generated = _mass(call, blocks, scale, prompt).masked_fill(of_prompt, -1)
    count = int((~of_prompt).sum())
    return first | (_best(generated, min(count, int(count * keep) + 1)) & ~of_prompt)


def _mass(call: AttentionCall, blocks: Blocks, scale: float, start: int) -> Tensor:
    """The probability of each block of keys from `start` on, float32 `[H, C, C]`."""
    rows, n = call.intervals or RowIntervals(), call.q.shape[1]
    later = RowIntervals(start=torch.full((1, n), start, dtype=torch.int32))
    call = replace(call, scale=scale, rows=rows.meet(later), kv_len=None)
    whole = index_of(dict.fromkeys(range(call.q.shape[2]), blocks.whole))
    stretch = mass_stretch(blocks)
    _, found = attended_call(call, whole, "auto", stretch)
    assert found.mass is not None, "it was asked for"
    return mass_by_block(found.mass, blocks, stretch)[0]


def _best(p: Tensor, count: int) -> Tensor:
    """The `count` greatest of each row: bool, as `p`."""
    best = p.topk(min(count, p.shape[-1]), -1).indices
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, best, True)
