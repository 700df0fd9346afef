"""Dense and sparse generations of held-out cases: what a plan really gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..call import AttentionCall, Intercept
from ..generation import Case
from ..integrations import Attachment, Caching, Workload, attached, components
from ..patch import patch
from ..plan import Plan, Stage
from ..step_cache import StepCache
from ..timing import Pairs, Stopwatch, Taken


@dataclass(frozen=True, eq=False)
class Reference:
    """A dense generation.

    Args:
        case: The prompt and seed that was generated.
        output: What came out, as `Workload.run` gives it.
        taken: What the whole pipeline call took.
        forwards: For each component the noise level of each of its forwards (times the batch).
        attention: For each component the part of `seconds` that its self-attention took.
        by_layer: For each component and layer the noise level of each of its calls (times the batch), which a
            step cache makes differ; not kept in files.
    """

    case: Case
    output: Any
    taken: Taken
    forwards: dict[str, list[float]]
    attention: dict[str, float]
    by_layer: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The seconds of the whole pipeline call; see `Taken.seconds`."""
        return self.taken.seconds

    def calls(self, component: str, stages: Sequence[Stage]) -> list[int]:
        """Forwards that fall into each stage."""
        sigmas = self.forwards[component]
        return [sum(stage.covers(sigma, "any") for sigma in sigmas) for stage in stages]


def stock(call: AttentionCall) -> Tensor:
    """An intercept that changes nothing."""
    return call.stock()


class _Count:
    """An intercept that notes the noise level of each call and item, of the first layer that of each forward,
    and how long stock attention takes."""

    def __init__(self, then: Intercept) -> None:
        self.by_layer: dict[str, list[float]] = {}
        self.watch = Stopwatch()
        self._then = then

    def __call__(self, call: AttentionCall) -> Tensor:
        seen = self.by_layer.setdefault(call.layer, [])
        if call.context.sigma is not None:
            seen += [call.context.sigma] * call.q.shape[0]
        call.stock = functools.partial(self.watch.run, call.stock, call.q.device)
        return self._then(call)

    @property
    def sigmas(self) -> list[float]:
        """The noise level of each forward and item."""
        return next(iter(self.by_layer.values()), [])


def dense_reference(
    work: Workload,
    case: Case,
    watched_by: Mapping[str, Intercept] | None = None,
    cache: StepCache | None = None,
) -> Reference:
    """Run a case with stock attention, count forwards and time attention.

    Args:
        work: What is run; the model is not patched.
        case: The prompt and seed.
        watched_by: For components by name an intercept that sees every call and returns what stock
            attention gives. What it takes is in the reference's seconds.
        cache: A step cache to run it with.

    Raises:
        ValueError: If the output holds NaN or Inf, or the model doesn't take the cache.
    """
    seen = watched_by or {}
    counters = {name: _Count(seen.get(name, stock)) for name in components(work.model)}
    with attached(work.model, counters) as attachments:
        if cache is not None:
            cache_steps(cache, attachments)
        output, taken = work.run(case)
    check_stock(work, case, output)
    forwards = {name: counter.sigmas for name, counter in counters.items()}
    attention = {name: counter.watch.seconds for name, counter in counters.items()}
    by_layer = {name: counter.by_layer for name, counter in counters.items()}
    return Reference(case, output, taken, forwards, attention, by_layer)


def cache_steps(cache: StepCache, attachments: Mapping[str, Attachment]) -> None:
    """Enable a step cache until all is detached.

    Raises:
        ValueError: If a component takes none, or has one already.
    """
    for name, attachment in attachments.items():
        if not isinstance(attachment, Caching):
            raise ValueError(f"{name} takes no step cache; leave {cache} out")
        if attachment.step_cache is not None:
            raise ValueError(
                f"{name} has a step cache already, and a search compares with dense steps; call "
                "transformer.disable_cache() first"
            )
        attachment.enable_step_cache(cache)


def check_stock(work: Workload, case: Case, output: Any) -> None:
    """Raise ValueError if what came out without any plan holds NaN or Inf."""
    if not math.isfinite(work.difference(output, output)[work.loss]):
        raise ValueError(
            f"the stock model gives NaN or Inf for {case.prompt!r}: it is broken at this size or dtype"
        )


@dataclass(frozen=True)
class Verified:
    """What a plan gave on held-out cases.

    Args:
        difference: How far the sparse outputs are from the dense ones, by metric, mean over cases; see
            `Workload.difference`.
        speedup: The seconds of the dense over those of the sparse generations; 1 if no attention call ran
            sparse and the plan has no step cache.
        sparse_seconds: What all sparse generations took together.
        pairs: How long each case took, dense and sparse; None where the speed-up is 1 for that reason.
        by_case: The differences of each case, in the order of the references.
    """

    difference: Mapping[str, float]
    speedup: float
    sparse_seconds: float
    pairs: Pairs | None = None
    by_case: Sequence[Mapping[str, float]] = ()


def mean_over(cases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over cases."""
    return {name: float(np.mean([case[name] for case in cases])) for name in cases[0]}


def verify(
    work: Workload, plan: Plan, references: Sequence[Reference], backend: str = "auto"
) -> Verified:
    """Run the case of every reference with the plan, and compare the outputs.

    Args:
        work: What is run, as the references were; the model is not patched, and is left so.
        plan: The plan to verify.
        references: Dense runs of the cases.
        backend: The backend of sparse attention, as `patch` takes it.

    Raises:
        ValueError: If a sparse output holds NaN or Inf.
    """
    found, sparse, sparse_calls = [], [], 0
    for reference in references:
        with patch(work.model, plan, backend=backend) as handle:
            output, taken = work.run(reference.case)
        sparse_calls += handle.summary().sparse_calls
        sparse.append(taken)
        found.append(work.difference(output, reference.output))
        if not math.isfinite(found[-1][work.loss]):
            raise ValueError(f"the plan gives NaN or Inf on {reference.case.prompt!r}")
    timed = sparse_calls or StepCache.of(plan) is not None
    pairs = Pairs([reference.taken for reference in references], sparse) if timed else None
    return Verified(
        mean_over(found),
        pairs.speedup if pairs else 1.0,
        sum(taken.seconds for taken in sparse),
        pairs,
        tuple(found),
    )
