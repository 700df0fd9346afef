"""`search_language_model`: score patterns on texts, measure costs, solve, verify on other texts."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...integrations import heads_of, unpatched
from ...layout import TokenLayout
from ...on_cpu import on_cpu
from ...patch import patch
from ...plan import ComponentPlan, HeadChoice, Plan, config_hash
from ...timing import Pairs, Taken, timing_of
from ..front import Front, front_of, model_hash
from ..local import improve
from ..options import by_keywords
from ..provenance import made_with
from ..solve import Choice, Problem, cheapest, evaluate, least_loss
from ..tune import Clock
from .breakeven import break_even
from .candidates import candidates
from .costs import Costs
from .options import Given, LanguageOptions
from .problem import PREFILL, Scores, planned, problem_of
from .prompts import read_prompt
from .reading import Passkey, Read, Text, finds, passkeys, read
from .scores import COMPONENT
from .scoring import scored

MARGIN = 0.9  # of a limit that is aimed at after it was missed
NEAR = 0.75  # of a limit that is kept: nearer isn't worth another round
FIRST_SCALE = 15.0  # measured divergence over loss until a round measures it: 10 to 19 on SmolLM2


@dataclass(frozen=True, eq=False)
class Verified:
    """What a plan does on the held-out texts, beside dense attention.

    Attributes:
        kl: Mean divergence in nats a token.
        expected_kl: What was forecast of it.
        ppl_increase: Mean relative increase of perplexity.
        agreement: Share of the places whose most likely next token is that of dense attention.
        pairs: The times of the dense and of the sparse readings.
        found: How many passkeys were found with the plan, of those found dense.
    """

    kl: float
    expected_kl: float
    ppl_increase: float
    agreement: float
    pairs: Pairs
    found: int


@dataclass(eq=False)
class _Search:
    """A search that is under way."""

    model: Any
    options: LanguageOptions
    texts: list[Text]
    held_out: list[Text]
    clock: Clock
    layers: Scores = field(default_factory=dict)
    passkeys: list[Passkey] = field(default_factory=list)
    dense: list[Read] = field(default_factory=list)
    scale: float = FIRST_SCALE  # rows are scored one by one, but their changes add up over layers


@dataclass(frozen=True, eq=False)
class SearchedLanguage:
    """A plan with what it was found from.

    Args:
        plan: The plan that was found.
        scores: What each pattern changes in each head, by layer and modality.
        problem: The units, with what each of their candidates costs and spoils.
        choice: The candidate of each unit that the plan takes.
        kl_of_loss: The divergence for each unit of the problem's loss, as measured last.
    """

    plan: Plan
    scores: Scores
    problem: Problem
    choice: Choice
    kl_of_loss: float

    @functools.cached_property
    def front(self) -> Front:
        """Other points of the same problem, with the divergence that the verified plan lets expect."""

        def heads(choice: Choice) -> list[HeadChoice]:
            layers = planned(self.scores, self.problem, choice)
            return [head for stages in layers.values() for of in stages for head in of]

        model = model_hash(self.plan.components)
        return front_of(self.problem, model, self.choice, kl_of_loss=self.kl_of_loss, heads=heads)


@by_keywords(LanguageOptions)
def search_language_plan(
    model: Any, texts: Sequence[Given], options: LanguageOptions
) -> SearchedLanguage:
    """Find a plan for the prefill of a causal language model or VLM of transformers.

    The model is left as it was, whatever happens.

    Args:
        model: The model, not patched.
        texts: Texts, or their tokens int64 `[N]`; of a VLM also prompts with images or videos, as its
            processor makes them. The last of several is held out to verify on, unless `held_out` is given.
        options: What is asked for: each field of `LanguageOptions` is a keyword.

    Raises:
        ValueError: If there is no text, one is too short, the model is patched, or a number is out of range.
        TypeError: If the model is none of transformers.
        NotImplementedError: If no layer of it attends in plain causal order.
    """
    return _found(model, texts, options)


@by_keywords(LanguageOptions)
def search_language_model(model: Any, texts: Sequence[Given], options: LanguageOptions) -> Plan:
    """The plan of `search_language_plan`, without all that it was found from."""
    return _found(model, texts, options).plan


@on_cpu
def _found(model: Any, texts: Sequence[Given], options: LanguageOptions) -> SearchedLanguage:
    unpatched(model)
    given, held = options.split(texts)
    was_training = model.training
    model.eval()
    run = _Search(
        model,
        options,
        [_read(model, text, options) for text in given],
        [_read(model, text, options) for text in held],
        Clock(model.device),
    )
    try:
        return _searched(run)
    finally:
        model.train(was_training)


def _read(model: Any, text: Given, options: LanguageOptions) -> Text:
    if isinstance(text, Mapping):
        return read_prompt(model, text)
    return options.text(text)


def _searched(run: _Search) -> SearchedLanguage:
    options, clock = run.options, run.clock
    patterns = candidates(media=any(text.modalities is not None for text in run.texts))
    run.layers, costs = scored(run.model, options, run.texts, patterns)
    clock.lap("score")
    options.say(f"dense readings of {len(run.held_out)} held-out texts")
    run.dense = [read(run.model, text) for text in run.held_out]
    if options.tokenizer is not None and options.passkey_depths:
        tokens = run.held_out[0].ids.shape[1]
        asked = passkeys(options.tokenizer, tokens, options.passkey_depths)
        run.passkeys = [passkey for passkey in asked if finds(run.model, passkey)]
    clock.lap("references")
    seconds = sum(found.taken.seconds for found in run.dense) / len(run.dense)
    task = problem_of(run.model, run.layers, patterns, costs, seconds)
    choice, verified = _tuned(run, task)
    clock.lap("verify")
    plan = _plan(run, task, choice, verified.expected_kl)
    (name, part), *_ = plan.components.items()
    heads = [head.pattern for stages in part.layers.values() for heads in stages for head in heads]
    least = break_even(costs.call, heads)
    clock.lap("break-even")
    part = replace(part, valid_tokens=(least, None))
    plan = replace(
        plan,
        components={name: part},
        provenance=_provenance(run, costs),
        measured=_measured(run, verified),
    )
    return SearchedLanguage(plan, run.layers, task, choice, run.scale)


def _tuned(run: _Search, task: Problem) -> tuple[Choice, Verified]:
    """The choice that keeps what was asked for on the held-out texts, and what it does there."""
    options = run.options
    if options.target_speedup is not None:
        choice = least_loss(task, options.target_speedup)
        if choice is None:
            most = evaluate(task, task.seconds.argmin(1)).speedup
            raise ValueError(
                f"target_speedup must be at most {most:.2f} for this model at this length (attention is "
                f"{task.stock_seconds.sum() / task.dense_seconds:.0%} of it), got {options.target_speedup:g}"
            )
        limit = task.dense_seconds / options.target_speedup
        choice = improve(task, choice, seconds=limit)
        return choice, _verified(run, task, choice)
    allowed, best = options.allowed_kl / run.scale, None
    for _ in range(options.rounds):
        choice = _within(task, allowed)
        if best is not None and torch.equal(choice.pick, best[0].pick):
            break  # the fastest there is
        verified = _verified(run, task, choice)
        over = options.excess(verified.kl, verified.ppl_increase)
        lost = len(run.passkeys) - verified.found
        if over <= 1 and not lost:
            if best is None or choice.speedup > best[0].speedup:
                best = choice, verified
            if over > NEAR:
                break
            allowed *= min(4.0, MARGIN / max(over, 0.05))
        else:
            allowed = choice.loss * min(MARGIN / over if over > 1 else 1.0, 0.5 if lost else 1.0)
            if best is not None and best[0].loss >= allowed:
                break
    if best is None:
        options.say("no plan keeps what was asked for; this one is all dense")
        choice = evaluate(task, torch.zeros(len(task.units), dtype=torch.int64))
        best = choice, _verified(run, task, choice)
    return best


def _within(task: Problem, loss: float) -> Choice:
    """The fastest choice with at most so much forecast loss."""
    start = cheapest(task, lambda choice: choice.loss <= loss)
    return improve(task, start, loss=max(loss, start.loss))


def _verified(run: _Search, task: Problem, choice: Choice) -> Verified:
    expected = choice.loss * run.scale
    with patch(run.model, _plan(run, task, choice, expected), backend=run.options.backend):
        sparse = [read(run.model, text) for text in run.held_out]
        rows = list(zip(sparse, run.dense, run.held_out, strict=True))
        kl = sum(mine.divergence(dense) for mine, dense, _ in rows) / len(rows)
        more = sum(mine.perplexity_increase(dense, text) for mine, dense, text in rows) / len(rows)
        kept = run.options.keeps(kl, more)  # else there is no need to ask
        found = sum(finds(run.model, passkey) for passkey in run.passkeys if kept)
    same = sum(mine.agreement(dense) for mine, dense, _ in rows) / len(rows)
    if choice.loss > 0:
        run.scale = kl / choice.loss
    taken: list[list[Taken]] = [[one.taken for one in side] for side in (run.dense, sparse)]
    verified = Verified(kl, expected, more, same, Pairs(*taken), found)
    passed = f", {found}/{len(run.passkeys)} passkeys" if run.passkeys and kept else ""
    run.options.say(
        f"density {choice.density:.1%}: {verified.pairs.speedup:.2f}x (forecast {choice.speedup:.2f}x), KL "
        f"{kl:.4f} (forecast {expected:.4f}), perplexity {more:+.1%}{passed}"
    )
    return verified


def _plan(run: _Search, task: Problem, choice: Choice, expected_kl: float) -> Plan:
    heads = heads_of(run.model)
    layers = planned(run.layers, task, choice)
    part = ComponentPlan(
        type(run.model).__name__,
        config_hash(run.model.config),
        {layer: heads[layer] for layer in layers},
        TokenLayout.sequence(max(text.ids.shape[1] for text in run.texts)),
        (PREFILL,),
        layers,
        kind="language_model",
    )
    forecast = {
        "speedup": round(choice.speedup, 4),
        "kl": round(expected_kl, 6),
        "seconds": round(choice.seconds, 4),
        "dense_seconds": round(task.dense_seconds, 4),
    }
    share = task.weight.sum().item()  # other layers are dense
    density = choice.density * share + 1 - share
    return Plan("", {COMPONENT: part}, round(density, 6), forecast=forecast)


def _measured(run: _Search, verified: Verified) -> dict[str, Any]:
    found = {"passkeys": f"{verified.found}/{len(run.passkeys)}"} if run.passkeys else {}
    return {
        "kl": round(verified.kl, 6),
        "ppl_increase": round(verified.ppl_increase, 6),
        "agreement": round(verified.agreement, 5),
        "speedup": round(verified.pairs.speedup, 4),
        **timing_of(verified.pairs),
        **found,
        "held_out_texts": len(run.held_out),
        "met": run.options.met(verified.kl, verified.ppl_increase, verified.pairs.speedup)
        and verified.found == len(run.passkeys),
    }


def _provenance(run: _Search, costs: Costs) -> dict[str, Any]:
    options = run.options
    return {
        **made_with("torch", "transformers"),
        "device": str(run.model.device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "objective": options.objective,
        "calibration_tokens": [text.ids.shape[1] for text in run.texts],
        "held_out_tokens": [text.ids.shape[1] for text in run.held_out],
        "rows": options.rows,
        "draws": options.draws,
        "stock_seconds": costs.stock,
        "search_seconds": {phase: round(value, 3) for phase, value in run.clock.laps.items()},
    }
