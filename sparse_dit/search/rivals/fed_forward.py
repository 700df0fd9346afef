"""Sparse-vDiT's rule as its paper runs it: layer by layer, on what the sparse layers before give.

One generation decides: at each noise level a layer's heads are judged on the inputs that all choices made so
far lead to, and what they chose is computed at once. Its density depends on epsilon, so a few generations
look for the one that gives the wanted density.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...index import build_index
from ...integrations.call import AttentionCall
from ...layout import TokenLayout
from ..candidates import DENSE
from ..sampling import attention_over, whole_layout
from ..side_by_side import one_thread
from .rule import Rule, picked_density
from .scores import Judge, RivalScores

PASSES = 7  # generations that look for epsilon
NEAR = 0.01  # of the wanted density, below it: near enough


class _Sequential:
    """An intercept that decides a layer's heads at the first call of a noise level, and computes that.

    Args:
        judge: Measures patterns on sampled rows.
        scores: The patterns, and their density.
        rule: How to decide.
    """

    def __init__(self, judge: Judge, scores: RivalScores, rule: Rule) -> None:
        self.judge, self.scores, self.rule = judge, scores, rule
        shape = scores.error.shape[:-1]
        self.pick = torch.full(shape, -1)
        self.decided = torch.zeros(shape[:2], dtype=torch.bool)

    def __call__(self, call: AttentionCall) -> Tensor:
        place = self.judge.place_of(call)
        layout = whole_layout(call)
        if place is None or layout is None:
            return call.stock()
        if not self.decided[place]:
            with one_thread():
                self.pick[place] = self._decide(call, layout, place)
            self.decided[place] = True
        if (self.pick[place] < 0).all():
            return call.stock()
        level, layer = place
        patterns = [
            DENSE if n < 0 else self.scores.patterns[level, call.layer, head][n]
            for head, n in enumerate(self.pick[level, layer].tolist())
        ]
        return attention_over(call, build_index(patterns, layout))

    def _decide(self, call: AttentionCall, layout: TokenLayout, place: tuple[int, int]) -> Tensor:
        level, modes = place[0], list(self.rule.modes)
        patterns = [
            [self.scores.patterns[level, call.layer, head][n] for n in modes]
            for head in range(call.q.shape[2])
        ]
        error, norm = self.judge(call, layout, patterns)
        return self.rule(
            error / norm[:, None].clamp_min(1e-20), self.scores.density[place][:, modes]
        )


def fed_forward(
    scores: RivalScores, share: Tensor, target: float, rule: Rule
) -> tuple[Tensor, Rule] | None:
    """The picks `[S, L, H]` (-1 for dense) of the rule fed forward, at a density not above `target`.

    Args:
        scores: Of stock inputs; what runs generations.
        share: `[S]`, of each level in the attention calls.
        target: Density.
        rule: Where the search for epsilon begins: that of the errors of stock inputs.

    Returns:
        None if no epsilon that was tried is so sparse.
    """
    low, high, best = 0.0, None, None  # of epsilon; a greater one is sparser
    epsilon = rule.epsilon
    for _ in range(PASSES):
        tried = replace(rule, epsilon=epsilon)
        sequential = _Sequential(scores.judge(), scores, tried)
        scores.generate(sequential)
        density = picked_density(sequential.pick, scores.density, share)
        if density <= target:
            high = epsilon
            if best is None or density > best[0]:
                best = (density, sequential.pick, tried)
            if density >= target - NEAR:
                break
        else:
            low = epsilon
        epsilon = 2 * low if high is None else (low + high) / 2
        epsilon = max(epsilon, 1e-6)
    return None if best is None else best[1:]
