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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...call import AttentionCall
from ...entry import PatternIndex
from ...estimate import estimated_index
from ...integrations import attached
from ...intervals import causal_items
from ...patterns import Pattern
from ...runtime import attend_call
from ...timing import timed
from .reading import Passkey

COMPONENT = "model"
REPEATS = 3
PLACES = 512  # of a text at which tokens are drawn
ASKING = 32  # last rows of a question, which ask and answer


@dataclass(eq=False)
class LayerScores:
    """Sums over the sampled rows of all texts.

    Attributes:
        error: float64 `[H, K]`, squared changes of the head's output.
        norm: float64 `[H]`, squared exact outputs.
        loss: float64 `[H, K]`, expected divergence in nats a token, by the shares of the texts.
        density: float64 `[H, K]`, computed pairs over those of causal order, summed over texts.
        texts: How many texts.
    """

    error: Tensor
    norm: Tensor
    loss: Tensor
    density: Tensor
    texts: int = 0

    @staticmethod
    def empty(heads: int, patterns: int) -> LayerScores:
        """Nothing yet."""
        error, loss, density = (torch.zeros(heads, patterns).double() for _ in range(3))
        return LayerScores(error, torch.zeros(heads).double(), loss, density)


@dataclass(eq=False)
class Costs:
    """Seconds of one attention call of a layer, for each head.

    Args:
        stock: What the host's own attention takes.
        sparse: For each pattern what a head takes in a layer whose heads all have it, estimate included.
        call: The call that was timed: its tensors serve to find the break-even.
    """

    stock: float
    sparse: list[float]
    call: AttentionCall = field(repr=False)


@dataclass(frozen=True, eq=False)
class Item:
    """What patterns are scored on.

    Args:
        ids: int64 `[1, N]`.
        rows: int64 `[R]`, the rows whose outputs are computed.
        weights: float32 `[R]`, how many rows each stands for.
        places: int64 `[P]`, where tokens are drawn.
        share: Of the item in the loss of all.
    """

    ids: Tensor
    rows: Tensor
    weights: Tensor
    places: Tensor
    share: float

    @staticmethod
    def of_text(ids: Tensor, rows: int, seed: int, share: float) -> Item:
        """A text, of which everything counts."""
        tokens = ids.shape[1]
        picked = sampled_rows(tokens, rows, seed)
        weights = torch.full((len(picked),), tokens / len(picked))
        return Item(ids, picked, weights, sampled_rows(tokens, PLACES, seed + 1), share)

    @staticmethod
    def of_passkey(passkey: Passkey, rows: int, seed: int, share: float) -> Item:
        """A question, of which the answer counts; the rows that ask and answer are all sampled."""
        tokens = passkey.ids.shape[1]
        before = tokens - min(ASKING, tokens // 2)
        picked = sampled_rows(before, rows, seed)
        weights = torch.full((len(picked),), before / len(picked))
        last = torch.arange(before, tokens)
        places = torch.arange(tokens - passkey.answer - 1, tokens - 1)
        rows_, weights = torch.cat([picked, last]), torch.cat([weights, torch.ones(len(last))])
        return Item(passkey.ids, rows_, weights, places, share)


def sampled_rows(tokens: int, rows: int, seed: int) -> Tensor:
    """Row numbers, one at random from each of `rows` equal parts, int64 `[R]`; all if there are no more."""
    if tokens <= rows:
        return torch.arange(tokens)
    drawn = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((torch.arange(rows) + drawn) * tokens / rows).long()


def influences(model: Any, item: Item, draws: int, seed: int) -> dict[str, Tensor]:
    """Gradients of drawn tokens' log-likelihoods by heads' outputs: `[S, R, H, D]` for each layer.

    Args:
        model: The model, not attached.
        item: Where tokens are drawn, and by which rows' outputs.
        draws: S, how often they are drawn.
        seed: Of the draws.
    """
    ids, places = item.ids.to(model.device), item.places.to(model.device)
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
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
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
        timed_layer: The layer whose calls are timed; None for none.
    """

    def __init__(
        self,
        patterns: Sequence[Pattern],
        item: Item,
        grads: dict[str, Tensor],
        layers: dict[str, LayerScores],
        timed_layer: str | None,
    ) -> None:
        self.patterns, self.item, self.grads, self.layers = patterns, item, grads, layers
        self.timed_layer = timed_layer
        self.costs: Costs | None = None

    @torch.no_grad()
    def __call__(self, call: AttentionCall) -> Tensor:
        """Stock attention's output."""
        if is_whole(call):
            self._score(call)
            if call.layer == self.timed_layer:
                self.costs = costs_of(call, self.patterns)
        return call.stock()

    def _score(self, call: AttentionCall) -> None:
        heads, count = call.q.shape[2], len(self.patterns)
        scores = self.layers.setdefault(call.layer, LayerScores.empty(heads, count))
        scores.texts += 1
        rows, item = self.item.rows, self.item
        q, k, v = (x[0].float().cpu().transpose(0, 1) for x in (call.q, call.k, call.v))
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        indices = [_index(call, [pattern] * heads) for pattern in self.patterns[1:]]
        seen = [{entry: seen_by(entry, rows) for entry in index.entries} for index in indices]
        causal = torch.arange(k.shape[1]) <= rows[:, None]
        pairs = causal.float().sum(1) @ item.weights
        grads, shared = self.grads[call.layer], heads // k.shape[0]
        scores.density[:, 0] += 1
        for head in range(heads):
            logits = (q[head, rows] @ k[head // shared].T) * scale
            p, values = logits.masked_fill(~causal, -torch.inf).softmax(-1), v[head // shared]
            exact = p @ values
            scores.norm[head] += exact.square().sum()
            for number, (index, found) in enumerate(zip(indices, seen, strict=True), 1):
                sees = found[index.entries[index.head_to_pattern[head]]] & causal
                kept = p * sees
                change = (kept @ values) / kept.sum(-1, keepdim=True).clamp_min(1e-20) - exact
                told = _told(grads[:, :, head], change, item.weights)
                scores.error[head, number] += change.square().sum()
                scores.loss[head, number] += 0.5 * item.share * told / len(item.places)
                scores.density[head, number] += (sees.float().sum(1) @ item.weights) / pairs


def _told(grads: Tensor, change: Tensor, weights: Tensor) -> Tensor:
    """Expected square of the change of a likelihood, of all rows together.

    It is the mean of two estimates: along the change, which is noisy where few tokens are drawn, so that of
    many patterns the luckiest would be taken; and in any direction, which knows but the size of both.

    Args:
        grads: `[S, R, D]`.
        change: `[R, D]`.
        weights: `[R]`.
    """
    along = (grads * change).sum(-1).square().mean(0)
    anyhow = grads.square().sum(-1).mean(0) * change.square().mean(-1)
    return (along + anyhow) @ weights / 2


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


def costs_of(call: AttentionCall, patterns: Sequence[Pattern]) -> Costs:
    """Time a call's stock attention, and each pattern for all of its heads; the fastest of three in turn.

    Args:
        call: A whole call.
        patterns: What is timed, dense first.
    """
    heads, device = call.q.shape[2], call.q.device
    kept = _detached(call)
    runs = [call.stock, *(lambda p=p: _run(kept, [p] * heads) for p in patterns)]
    best = [float("inf")] * len(runs)
    for _ in range(REPEATS):
        for place, run in enumerate(runs):
            best[place] = min(best[place], timed(run, device))
    return Costs(best[0] / heads, [seconds / heads for seconds in best[1:]], kept)


def _detached(call: AttentionCall) -> AttentionCall:
    """The call's tensors alone, in plain causal order; of its host nothing is kept."""
    q, k, v = (x.detach().clone() for x in (call.q, call.k, call.v))
    return _causal_call(call, q, k, v)


def _index(call: AttentionCall, patterns: Sequence[Pattern]) -> Any:
    q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)
    return estimated_index(q, k, [pattern.shape for pattern in patterns], scale=call.scale)


def _run(call: AttentionCall, patterns: Sequence[Pattern]) -> None:
    attend_call(call, _index(call, patterns))


def shortened(call: AttentionCall, tokens: int) -> AttentionCall:
    """The call over its first tokens."""
    return _causal_call(call, *(x[:, :tokens] for x in (call.q, call.k, call.v)))


def _causal_call(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
    def stock() -> Tensor:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        shared = q.shape[2] != k.shape[2]
        out = scaled_dot_product_attention(
            q_, k_, v_, is_causal=True, scale=call.scale, enable_gqa=shared
        )
        return out.transpose(1, 2)

    rows = causal_items(q.shape[0], q.shape[1])
    return AttentionCall(
        call.layer, q, k, v, None, None, call.scale, call.context, None, stock, rows=rows
    )
