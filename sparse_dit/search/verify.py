"""Dense and sparse generations of held-out cases: what a plan really gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..call import AttentionCall, Intercept
from ..generation import Case
from ..integrations import Workload, attached, components
from ..patch import patch
from ..plan import Plan, Stage
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
    """

    case: Case
    output: Any
    taken: Taken
    forwards: dict[str, list[float]]
    attention: dict[str, float]

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
    """An intercept that notes the noise level of each forward and item, at the first attention layer, and
    how long stock attention takes."""

    def __init__(self, then: Intercept) -> None:
        self.sigmas: list[float] = []
        self.watch = Stopwatch()
        self._then = then
        self._first: str | None = None

    def __call__(self, call: AttentionCall) -> Tensor:
        self._first = self._first or call.layer
        if call.layer == self._first and call.context.sigma is not None:
            self.sigmas += [call.context.sigma] * call.q.shape[0]
        call.stock = functools.partial(self.watch.run, call.stock, call.q.device)
        return self._then(call)


def dense_reference(
    work: Workload, case: Case, watched_by: Mapping[str, Intercept] | None = None
) -> Reference:
    """Run a case with stock attention, count forwards and time attention.

    Args:
        work: What is run; the model is not patched.
        case: The prompt and seed.
        watched_by: For components by name an intercept that sees every call and returns what stock
            attention gives. What it takes is in the reference's seconds.

    Raises:
        ValueError: If the output holds NaN or Inf.
    """
    seen = watched_by or {}
    counters = {name: _Count(seen.get(name, stock)) for name in components(work.model)}
    with attached(work.model, counters):
        output, taken = work.run(case)
    check_stock(work, case, output)
    forwards = {name: counter.sigmas for name, counter in counters.items()}
    attention = {name: counter.watch.seconds for name, counter in counters.items()}
    return Reference(case, output, taken, forwards, attention)


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
            sparse.
        sparse_seconds: What all sparse generations took together.
        pairs: How long each case took, dense and sparse; None if no attention call ran sparse.
        by_case: The differences of each case, in the order of the references.
    """

    difference: Mapping[str, float]
    speedup: float
    sparse_seconds: float
    pairs: Pairs | None = None
    by_case: Sequence[Mapping[str, float]] = ()


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
    pairs = Pairs([reference.taken for reference in references], sparse) if sparse_calls else None
    return Verified(
        {name: float(np.mean([each[name] for each in found])) for name in found[0]},
        pairs.speedup if pairs else 1.0,
        sum(taken.seconds for taken in sparse),
        pairs,
        tuple(found),
    )
