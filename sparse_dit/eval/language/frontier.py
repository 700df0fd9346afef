"""Searched plans against published rules on texts: at equal density, and at equal measured time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ...call import AttentionCall
from ...environment import environment
from ...index import SparseIndex
from ...integrations import attached, heads_of
from ...outputs import Outputs, check_writable
from ...patch import EXACT, check_fits, patch
from ...plan import Plan
from ...runtime import attend_call
from ...search.language.costs import index_of
from ...search.language.options import DEPTHS
from ...search.language.reading import Read, Text, read
from ...search.language.scores import COMPONENT, is_whole
from ...timing import Pairs, Timer
from ...words import option
from ..baselines import text as of_text
from ..baselines.vision import VISION_RULES
from ..rows import Row, keep_rows, kept_rows, model_told, plans_told, texts_told, weights_told
from .ask import answers
from .quality import LanguageRequest, Say, warm_up
from .tasks import Question, passkey_questions

FORMAT = "sparse_dit language frontier 1"
DENSITIES = (0.12, 0.25, 0.5)
RULES = {**of_text.RULES, **VISION_RULES}
Rule = Callable[[AttentionCall], SparseIndex | None]


@dataclass(frozen=True, kw_only=True)
class LanguageFrontier:
    """What to compare.

    Args:
        reading: The texts; rules get their densities on the first one.
        plans: Searched plans by name.
        densities: Computed pairs over those of causal order that rules are measured at.
        methods: Some of `RULES`.
        file: JSON of the rows; one that is there is gone on with.

    Raises:
        ValueError: If anything is out of range.
    """

    reading: LanguageRequest
    plans: dict[str, Plan]
    densities: Sequence[float] = DENSITIES
    methods: Sequence[str] = tuple(of_text.RULES)
    file: Path

    def __post_init__(self) -> None:
        if not all(0 < density < 1 for density in self.densities):
            raise ValueError(
                f"{option('densities')} must lie between 0 and 1, got {list(self.densities)}"
            )
        if unknown := set(self.methods) - set(RULES):
            raise ValueError(
                f"{option('methods')} must be among {list(RULES)}, got {sorted(unknown)}"
            )

    def check(self, model: Any) -> None:
        """Raise unless the plans are for the model and the file can be written."""
        for plan in self.plans.values():
            (name,) = plan.components
            check_fits(plan, name, model)
        check_writable(self.file, "file")
        kept_rows(self.file, FORMAT, self.conditions(model))

    def conditions(self, model: Any) -> dict[str, Any]:
        """What rows of one file have in common."""
        return {
            "model": model_told(model),
            "weights": weights_told(model),
            "texts": texts_told(self.reading.texts),
            "tokens": self.reading.tokens,
            "plans": plans_told(self.plans),
        }


@dataclass(eq=False)
class Ruled:
    """The intercept that computes what a rule says of each whole call, and stock elsewhere.

    Attributes:
        seconds: What finding indices took.
        indices: Those that were used.
        stock: Calls that ran stock.
    """

    rule: Rule
    seconds: float = 0.0
    indices: list[SparseIndex] = field(default_factory=list)
    stock: int = 0

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention's output `[B, N, H, D]`."""
        index = None
        if is_whole(call):
            timer = Timer(call.q.device)
            index = self.rule(call)
            self.seconds += timer.stop().seconds
        if index is None or index.is_dense:
            self.stock += 1
            return call.stock()
        self.indices.append(index)
        return attend_call(call, index)[0]

    @property
    def density(self) -> float:
        """Mean over calls; all layers have as many heads and see the same rows, or nearly so."""
        found = [index.density for index in self.indices]
        return (sum(found) + self.stock) / (len(found) + self.stock)


def rule_of(plan: Plan) -> Rule:
    """What a plan says, without its break-even, so that it is timed as others are."""
    (part,) = plan.components.values()
    patterns = {
        layer: [choice.pattern for choice in stages[0]] for layer, stages in part.layers.items()
    }

    def index(call: AttentionCall) -> SparseIndex | None:
        return index_of(call, patterns[call.layer]) if call.layer in patterns else None

    return index


def frontier(
    model: Any, tokenizer: Any, request: LanguageFrontier, say: Say, outputs: Outputs
) -> list[Row]:
    """Measure plans, then every rule at every density and at the time of every plan.

    Rows are in the file as soon as they are measured. Each has method, source, target (a density, or the plan
    whose time is met), the rule's number, density, seconds and dense_seconds of the texts read in turn,
    speedup, why that says little (`caution`, or None), index_seconds among the seconds, perplexity_increase,
    kl, kl_floor (dense by another kernel), agreement (share of places with dense's most likely next token),
    passkeys, and dense_passkeys; for prompts with images, which are judged by their own text, none is asked.

    Args:
        model: A causal language model, not patched.
        tokenizer: Its tokenizer.
        request: What to compare.
        say: Called with a line of text before each step.
        outputs: Has checked the file; knows where it lies afterwards.
    """
    request.check(model)
    conditions = request.conditions(model)
    rows = kept_rows(request.file, FORMAT, conditions)
    texts = list(request.reading.read_by(model, tokenizer).values())
    wanted = [(name, name) for name in request.plans]
    wanted += [
        (target, m) for target in (*request.densities, *request.plans) for m in request.methods
    ]
    done = {(row["target"], row["method"]) for row in rows}
    todo = [pair for pair in wanted if pair not in done]
    if not todo:
        return rows
    measure = _Measure(model, tokenizer if request.reading.asks else None, texts, say)
    say("densities of the rules on the first text")
    numbers = densities_of(model, texts[0], request.methods)
    provenance = environment(model.device)
    for count, (target, method) in enumerate(todo, 1):
        say(f"{count}/{len(todo)}: {method} at {target}")
        row: Row = {"method": method, "target": target}
        if method in request.plans:
            rule, row["source"] = rule_of(request.plans[method]), "searched"
        else:
            row["source"] = RULES[method].source
            density = _as_fast(rows, target, method) if isinstance(target, str) else target
            known = numbers[method]
            row["number"] = number = float(np.interp(density, known, RULES[method].numbers))
            rule = lambda call, m=method, x=number: RULES[m].index(call, x)  # noqa: E731
        rows.append({**row, **measure.row(rule)})
        keep_rows(outputs, request.file, FORMAT, conditions, provenance, rows)
    return rows


def densities_of(model: Any, text: Text, methods: Sequence[str]) -> dict[str, list[float]]:
    """The density of each rule for each of its numbers, on a text that is read dense."""
    found = {method: torch.zeros(len(RULES[method].numbers)) for method in methods}
    calls = 0

    def look(call: AttentionCall) -> Tensor:
        nonlocal calls
        if is_whole(call):
            calls += 1
            for method, sums in found.items():
                rule = RULES[method]
                sums += torch.tensor([rule.index(call, x).density for x in rule.numbers])
        return call.stock()

    with torch.no_grad(), attached(model, {COMPONENT: look}):
        read(model, text)
    layers = len(heads_of(model))
    return {
        method: ((sums + layers - calls) / layers).cummax(0).values.tolist()
        for method, sums in found.items()
    }


def _as_fast(rows: Sequence[Row], plan: str, method: str) -> float:
    """The density at which a method should be as fast as a plan was, by its rows at other densities."""
    (speed,) = (row["speedup"] for row in rows if row["method"] == plan)
    known = sorted(
        (row["speedup"], row["density"])
        for row in rows
        if row["method"] == method and not isinstance(row["target"], str)
    )
    if not known:
        raise ValueError(f"to meet a plan's time {method} must be measured at a density first")
    speeds, densities = zip(*known, strict=True)
    return float(np.interp(speed, speeds, densities))


class _Measure:
    """Reads the texts dense and by a rule in turn, and asks passkeys.

    Args:
        model: Not patched.
        tokenizer: Its tokenizer; None to ask nothing.
        texts: What is read.
        say: Called with a line of text.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[Text], say: Say) -> None:
        self.model, self.texts = model, texts
        say("dense readings and passkeys")
        warm_up(model, texts[0])
        self.dense = [read(model, text) for text in texts]
        with patch(model, EXACT):
            self.floor = self._kl([read(model, text) for text in texts])
        tokens = max(text.ids.shape[1] for text in texts)
        self.keys: list[Question] = []
        if tokenizer is not None:
            self.keys = passkey_questions(tokenizer, tokens, DEPTHS)
        self.found = self._found()

    def _kl(self, said: Sequence[Read]) -> float:
        pairs = zip(said, self.dense, strict=True)
        return sum(mine.divergence(dense) for mine, dense in pairs) / len(said)

    def _found(self) -> int:
        return sum(answers(self.model, key) for key in self.keys)

    def row(self, rule: Rule) -> Row:
        """The figures of a rule."""
        dense, sparse, ruled = [], [], []
        for text in self.texts:
            dense.append(read(self.model, text).taken)
            ruled.append(Ruled(rule))
            with torch.no_grad(), attached(self.model, {COMPONENT: ruled[-1]}):
                sparse.append(read(self.model, text))
        with torch.no_grad(), attached(self.model, {COMPONENT: Ruled(rule)}):
            found = self._found()
        more = [
            mine.perplexity_increase(before, text)
            for mine, before, text in zip(sparse, self.dense, self.texts, strict=True)
        ]
        same = [mine.agreement(before) for mine, before in zip(sparse, self.dense, strict=True)]
        pairs = Pairs(dense, [said.taken for said in sparse])
        return {
            "density": round(sum(r.density for r in ruled) / len(ruled), 5),
            "speedup": round(pairs.speedup, 4),
            "caution": pairs.caution,
            "seconds": round(sum(t.seconds for t in pairs.sparse), 3),
            "dense_seconds": round(sum(t.seconds for t in pairs.dense), 3),
            "index_seconds": round(sum(r.seconds for r in ruled), 5),
            "perplexity_increase": round(sum(more) / len(more), 6),
            "kl": round(self._kl(sparse), 6),
            "kl_floor": round(max(0.0, self.floor), 8),
            "agreement": round(sum(same) / len(same), 5),
            "passkeys": found,
            "dense_passkeys": self.found,
            "asked": len(self.keys),
        }


def figure_of(rows: Sequence[Row]) -> Figure:
    """Divergence over measured speed-up: a line for each rule, a star for each plan."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted((r["speedup"], r["kl"]) for r in rows if r["method"] == method)
        plan = method not in RULES
        marker, size = ("*", 12) if plan else ("osD^vPX"[number % 7], 6)
        speeds, divergences = zip(*points, strict=True)
        axes.plot(speeds, divergences, marker=marker, markersize=size, linewidth=1.2, label=method)
    axes.set_yscale("log")
    axes.set_xlabel("speed-up of a prefill over dense (measured)")
    axes.set_ylabel("divergence from dense, nats a token")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.2)
    return figure
