"""How far each pattern moves each head's output on a text, and how much that changes what the model says.

Of some rows, spread over the text, exact attention is computed and what a pattern would compute in its place.
The change of the output, times the gradient of the log-likelihood of tokens drawn from the model itself, is a
change of that likelihood; the half of its mean square is the divergence of what is said (Fisher's
information), to second order and with rows taken one by one; see `_told`.

A text may also be a question: then only what is said of the answer counts. Patterns that spoil a text little
may still lose a fact in its middle.

Letters in shapes: N tokens, R sampled rows, P places, S drawn texts, H heads, D channels, K patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...entry import PatternIndex
from ...integrations import attached
from ...modalities import Modality
from ...nan_guard import refuse_nan
from ...patterns import Pattern
from .costs import Costs, costs_of, index_of
from .items import Item

COMPONENT = "model"


@dataclass(eq=False)
class LayerScores:
    """Sums over the sampled rows of one modality, of all texts.

    Attributes:
        error: float64 `[H, K]`, squared changes of the head's output.
        norm: float64 `[H]`, squared exact outputs.
        loss: float64 `[H, K]`, expected divergence in nats a token, by the shares of the texts.
        density: float64 `[H, K]`, computed pairs over those of causal order, summed over texts.
        pairs: The modality's share in the pairs of causal order, summed over texts.
        texts: How many texts have the modality.
    """

    error: Tensor
    norm: Tensor
    loss: Tensor
    density: Tensor
    pairs: float = 0.0
    texts: int = 0

    @staticmethod
    def empty(heads: int, patterns: int) -> LayerScores:
        """Nothing yet."""
        error, loss, density = (torch.zeros(heads, patterns).double() for _ in range(3))
        return LayerScores(error, torch.zeros(heads).double(), loss, density)


def influences(model: Any, item: Item, draws: int, seed: int) -> dict[str, Tensor]:
    """Gradients of drawn tokens' log-likelihoods by heads' outputs: `[S, R, H, D]` for each layer.

    Args:
        model: The model, not attached.
        item: Where tokens are drawn, and by which rows' outputs.
        draws: S, how often they are drawn.
        seed: The seed of the draws.

    Raises:
        ValueError: If the model says NaN of a token.
    """
    places = item.places.to(model.device)
    taps: dict[str, Tensor] = {}

    def tapped(call: AttentionCall) -> Tensor:
        out = call.stock()
        taps[call.layer] = tap = torch.zeros_like(out, requires_grad=True)
        return out + tap

    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    drawn = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {}
    try:
        with torch.enable_grad(), attached(model, {COMPONENT: tapped}):
            inputs = item.text.inputs_on(model.device)
            logits = model(**inputs, use_cache=False, logits_to_keep=places).logits[0]
            refuse_nan(model, logits)
            said = logits.float().log_softmax(-1)
            for draw in range(draws):
                tokens = torch.multinomial(said.detach().exp().cpu(), 1, generator=drawn)
                likelihood = said.gather(1, tokens.to(said.device)).sum()
                grads = torch.autograd.grad(
                    likelihood, list(taps.values()), retain_graph=draw + 1 < draws
                )
                for layer, grad in zip(taps, grads, strict=True):
                    found.setdefault(layer, []).append(grad[0, item.rows].float().cpu())
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    return {layer: torch.stack(grads) for layer, grads in found.items()}


class Scorer:
    """The intercept that adds a text's scores; it runs stock attention.

    Args:
        patterns: The K candidates, dense first.
        item: The text.
        grads: Its influences.
        layers: The scores that are added to.
    """

    def __init__(
        self,
        patterns: Sequence[Pattern],
        item: Item,
        grads: dict[str, Tensor],
        layers: dict[str, dict[Modality, LayerScores]],
    ) -> None:
        self.patterns, self.item, self.grads, self.layers = patterns, item, grads, layers

    @torch.no_grad()
    def __call__(self, call: AttentionCall) -> Tensor:
        """Stock attention's output."""
        if is_whole(call):
            self._score(call)
        return call.stock()

    def _score(self, call: AttentionCall) -> None:
        heads, count = call.q.shape[2], len(self.patterns)
        rows, item = self.item.rows, self.item
        found = self.layers.setdefault(call.layer, {})
        scores = {m: found.setdefault(m, LayerScores.empty(heads, count)) for m in item.of}
        q, k, v = (x[0].float().cpu().transpose(0, 1) for x in (call.q, call.k, call.v))
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        indices = [index_of(call, [pattern] * heads) for pattern in self.patterns[1:]]
        seen = [{entry: seen_by(entry, rows) for entry in index.entries} for index in indices]
        causal = torch.arange(k.shape[1]) <= rows[:, None]
        pairs = causal.float().sum(1) * item.weights
        grads, shared = self.grads[call.layer], heads // k.shape[0]
        for modality, part in item.of.items():
            scores[modality].texts += 1
            scores[modality].density[:, 0] += 1
            scores[modality].pairs += (pairs[part].sum() / pairs.sum()).item()
        for head in range(heads):
            logits = (q[head, rows] @ k[head // shared].T) * scale
            p, values = logits.masked_fill(~causal, -torch.inf).softmax(-1), v[head // shared]
            exact = p @ values
            for modality, part in item.of.items():
                scores[modality].norm[head] += exact[part].square().sum()
            for number, (index, found) in enumerate(zip(indices, seen, strict=True), 1):
                sees = found[index.entries[index.head_to_pattern[head]]] & causal
                kept = p * sees
                change = (kept @ values) / kept.sum(-1, keepdim=True).clamp_min(1e-20) - exact
                told = _told(grads[:, :, head], change) * item.weights
                kept_pairs = sees.float().sum(1) * item.weights
                for modality, part in item.of.items():
                    to = scores[modality]
                    to.error[head, number] += change[part].square().sum()
                    to.loss[head, number] += 0.5 * item.share * told[part].sum() / len(item.places)
                    to.density[head, number] += kept_pairs[part].sum() / pairs[part].sum()


class Timing:
    """The intercept that times attention in one layer by each pattern; it runs stock attention.

    Args:
        layer: The layer's module path.
        patterns: The K candidates, dense first.

    Attributes:
        costs: What was timed; None if the layer had no whole text in plain causal order.
    """

    def __init__(self, layer: str, patterns: Sequence[Pattern]) -> None:
        self.layer, self.patterns = layer, patterns
        self.costs: Costs | None = None

    @torch.no_grad()
    def __call__(self, call: AttentionCall) -> Tensor:
        """Stock attention's output."""
        if call.layer == self.layer and is_whole(call):
            self.costs = costs_of(call, self.patterns)
        return call.stock()


def _told(grads: Tensor, change: Tensor) -> Tensor:
    """Expected square of the change of a likelihood by each row, `[R]`.

    It is the mean of two estimates: along the change, which is noisy where few tokens are drawn, so that of
    many patterns the luckiest would be taken; and in any direction, which knows but the size of both.

    Args:
        grads: `[S, R, D]`.
        change: `[R, D]`.
    """
    along = (grads * change).sum(-1).square().mean(0)
    anyhow = grads.square().sum(-1).mean(0) * change.square().mean(-1)
    return (along + anyhow) / 2


def is_whole(call: AttentionCall) -> bool:
    """Whether a call is a whole text in plain causal order, so that a pattern may be chosen for it.

    Layers with a sliding window are not: what they see is little already.
    """
    if call.unsupported or call.rows is None or call.sinks is not None:
        return False
    n = call.q.shape[1]
    start, stop = call.rows.bounds(n, n)
    return (
        n == call.k.shape[1]
        and not bool(start.any())
        and bool((stop[0] == torch.arange(1, n + 1)).all())
    )


def seen_by(entry: PatternIndex, rows: Tensor) -> Tensor:
    """Which keys each of some rows sees of an entry in place, whatever its intervals, bool `[R, M]`."""
    groups = torch.searchsorted(entry.q_offsets.long(), rows, right=True) - 1
    first, last = entry.run_offsets[groups].long(), entry.run_offsets[groups + 1].long()
    counts = last - first
    row = torch.repeat_interleave(torch.arange(len(rows)), counts)
    place = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    start, length = entry.runs[first[row] + place].long().unbind(1)
    edges = torch.zeros(len(rows), entry.num_keys + 1, dtype=torch.int32)
    one = torch.ones_like(row, dtype=torch.int32)
    edges.index_put_((row, start), one, accumulate=True)
    edges.index_put_((row, start + length), -one, accumulate=True)
    return edges.cumsum(1)[:, :-1] > 0
