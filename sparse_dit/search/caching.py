"""A step cache as a part of what is searched: what it gives alone, and the problem of what it lets run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..integrations import Workload, attached, components
from ..step_cache import StepCache
from ..timing import Pairs
from .solve import Problem
from .verify import Reference, cache_steps, dense_reference, mean_over, stock


@dataclass(frozen=True, eq=False)
class Cached:
    """What a step cache gives alone, all attention dense.

    Args:
        cache: The step cache.
        runs: The references' cases, generated with it.
        pairs: How long they took, beside the references.
        by_case: How far each output is from the dense, uncached one, by metric.
        computed: The share of the dense attention calls that ran.
    """

    cache: StepCache
    runs: Sequence[Reference]
    pairs: Pairs
    by_case: Sequence[Mapping[str, float]]
    computed: float

    @property
    def difference(self) -> dict[str, float]:
        """The mean of `by_case`."""
        return mean_over(self.by_case)


def cached_alone(work: Workload, references: Sequence[Reference], cache: StepCache) -> Cached:
    """Generate the references' cases with a step cache and dense attention.

    Raises:
        ValueError: If the model doesn't take the cache, or the output holds NaN or Inf.
    """
    runs = [dense_reference(work, reference.case, cache=cache) for reference in references]
    return Cached(
        cache,
        runs,
        Pairs([reference.taken for reference in references], [run.taken for run in runs]),
        tuple(
            work.difference(run.output, reference.output)
            for run, reference in zip(runs, references, strict=True)
        ),
        _computed(runs, references),
    )


def measured_scale(measured: float, forecast: float, spoilt: float = 0.0) -> float:
    """Measured over forecast loss, less what a step cache comes to; both sorts of error mostly add up."""
    return max(max(measured - spoilt, measured / 10) / forecast, 1e-12)


def check_takes(model: Any, cache: StepCache) -> None:
    """Raise ValueError unless a model takes a step cache and has none; its weights aren't needed."""
    with attached(model, dict.fromkeys(components(model), stock)) as attachments:
        cache_steps(cache, attachments)


def tried(
    work: Workload,
    references: Sequence[Reference],
    caches: Sequence[StepCache],
    too_bold: Callable[[Cached], bool],
    seen: Callable[[Cached], None],
) -> list[Cached]:
    """What some of the caches give alone: from the middle one towards the boldest that isn't too bold.

    Args:
        work: What is run; the model has no step cache.
        references: Dense generations to compare with.
        caches: From the most careful one to the boldest.
        too_bold: Whether a cache already misses what is asked for, or needs no sparse attention for it.
        seen: Called with each as it is known.
    """
    place = (len(caches) - 1) // 2
    found: dict[int, Cached] = {}

    def at(number: int) -> bool:
        found[number] = cached_alone(work, references, caches[number])
        seen(found[number])
        return too_bold(found[number])

    bold = at(place)
    step = -1 if bold else 1
    while 0 <= place + step < len(caches):
        place += step
        if at(place) != bold:
            break
    good = [number for number, one in found.items() if not too_bold(one)]
    if len(good) == 1 and good[0] > 0 and good[0] - 1 not in found:
        at(good[0] - 1)  # it may leave more to sparse attention
    return [found[number] for number in sorted(found)]


def _computed(runs: Sequence[Reference], references: Sequence[Reference]) -> float:
    """The share of attention calls that ran."""
    shares = [
        len(sigmas) / max(1, len(reference.forwards[name]))
        for run, reference in zip(runs, references, strict=True)
        for name, layers in run.by_layer.items()
        for sigmas in layers.values()
    ]
    return float(np.mean(shares)) if shares else 1.0


def with_cache(task: Problem, references: Sequence[Reference], cached: Cached) -> Problem:
    """The problem of a pipeline with a step cache: calls that it leaves out cost nothing.

    What an error spoils at a step that isn't computed is put down to the step whose result is taken in its
    place. Speed-ups stay those over the dense, uncached generation.

    Args:
        task: The problem of the same pipeline without a cache.
        references: The dense generations that it was made of.
        cached: The same cases with the cache.
    """
    ran, importance = torch.ones(len(task.units), dtype=torch.float64), task.importance.clone()
    places: dict[tuple[str, str], dict[int, list[int]]] = {}  # of each layer: its units by stage
    for number, (stage, layer, _) in enumerate(task.units):
        name = task.components[stage]
        places.setdefault((name, layer), {}).setdefault(stage, []).append(number)
    for (name, layer), units in places.items():
        stages = {number: task.stages[number] for number in units}
        share, moved = _shares(name, layer, stages, references, cached.runs)
        for stage, numbers in units.items():
            ran[numbers] = share[stage]
            importance[numbers] = sum(
                (part * task.importance[units[other]] for other, part in moved[stage].items()),
                torch.zeros(len(numbers), dtype=torch.float64),
            )
    other = task.other_seconds * min(1.0, _outside(cached.runs) / _outside(references))
    stock = task.stock_seconds * ran
    weight = task.weight * ran
    return replace(
        task,
        importance=importance,
        seconds=task.seconds * ran[:, None],
        stock_seconds=stock,
        weight=weight / weight.sum() if weight.sum() > 0 else task.weight,
        other_seconds=other,
        saved_seconds=max(0.0, task.dense_seconds - other - stock.sum().item()),
        ran=ran,
    )


def _outside(runs: Sequence[Reference]) -> float:
    """Seconds of generations outside of attention."""
    return max(1e-9, sum(run.seconds - sum(run.attention.values()) for run in runs))


def _shares(
    name: str,
    layer: str,
    stages: Mapping[int, Any],
    references: Sequence[Reference],
    runs: Sequence[Reference],
) -> tuple[dict[int, float], dict[int, dict[int, float]]]:
    """For each stage of a layer the share of its calls that ran, and whose calls its results stand for.

    The second is, for each stage, by other stages the share of these whose results come from it.
    """
    calls, ran = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    moved: dict[int, dict[int, int]] = {number: {} for number in stages}

    def stage_at(sigma: float) -> int | None:
        return next((n for n, stage in stages.items() if stage.covers(sigma, "any")), None)

    for reference, run in zip(references, runs, strict=True):
        computed = sorted(run.by_layer.get(name, {}).get(layer, ()))
        for sigma in reference.forwards[name]:
            at = stage_at(sigma)
            source = stage_at(next((one for one in computed if one >= sigma), sigma))
            if at is not None and source is not None:
                calls[at] += 1
                moved[source][at] = moved[source].get(at, 0) + 1
        for sigma in computed:
            at = stage_at(sigma)
            if at is not None:
                ran[at] += 1
    share = {n: ran[n] / calls[n] if calls[n] else 1.0 for n in stages}
    parts = {
        n: {other: count / calls[other] for other, count in moved[n].items()}
        if calls[n]
        else {n: 1.0}
        for n in stages
    }
    return share, parts
