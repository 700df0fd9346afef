"""Dense and sparse generations of held-out cases: what a plan really gives."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..call import AttentionCall, Intercept
from ..generation import Case, GenerationSettings, generate
from ..integrations.diffusers import attach, components
from ..patch import patch
from ..plan import Plan, Stage
from ..timing import Pairs, Stopwatch, Taken


@dataclass(frozen=True, eq=False)
class Reference:
    """A dense generation.

    Args:
        case: The prompt and seed that was generated.
        video: The frames, `[T, H, W, 3]` in 0..1.
        taken: What the whole pipeline call took.
        forwards: For each component the noise level of each of its forwards (times the batch).
        attention: For each component the part of `seconds` that its self-attention took.
    """

    case: Case
    video: np.ndarray
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
    pipe: Any,
    case: Case,
    settings: GenerationSettings,
    watched_by: Mapping[str, Intercept] | None = None,
) -> Reference:
    """Generate with stock attention, count forwards and time attention.

    Args:
        pipe: The pipeline, not patched.
        case: The prompt and seed that is generated.
        settings: The size and steps.
        watched_by: For components by name an intercept that sees every call and returns what stock
            attention gives. What it takes is in the reference's seconds.

    Raises:
        ValueError: If the video holds NaN or Inf.
    """
    counters, attachments = {}, []
    try:
        for name, module in components(pipe).items():
            counters[name] = _Count((watched_by or {}).get(name, stock))
            attachments.append(attach(module, counters[name], pipe))
        video, taken = generate(pipe, case, settings)
    finally:
        for attachment in attachments:
            attachment.detach()
    if not np.isfinite(video).all():
        raise ValueError(f"the stock pipeline gives NaN or Inf for {case.prompt!r}")
    forwards = {name: counter.sigmas for name, counter in counters.items()}
    attention = {name: counter.watch.seconds for name, counter in counters.items()}
    return Reference(case, video, taken, forwards, attention)


@dataclass(frozen=True)
class Verified:
    """What a plan gave on held-out cases.

    Args:
        mse: The mean squared difference between sparse and dense videos (in 0..1), mean over cases.
        psnr_db: The PSNR of the sparse videos against the dense ones, mean over cases.
        speedup: The seconds of the dense over those of the sparse generations; 1 if no attention call ran
            sparse.
        sparse_seconds: What all sparse generations took together.
        pairs: How long each case took, dense and sparse; None if no attention call ran sparse.
    """

    mse: float
    psnr_db: float
    speedup: float
    sparse_seconds: float
    pairs: Pairs | None = None


def verify(
    pipe: Any,
    plan: Plan,
    references: Sequence[Reference],
    settings: GenerationSettings,
    backend: str = "auto",
) -> Verified:
    """Generate the case of every reference with the plan, and compare the videos.

    Args:
        pipe: The pipeline, not patched; it is left so.
        plan: The plan to verify.
        references: Dense generations of the cases.
        settings: The size and steps, those of the references.
        backend: The backend of sparse attention, as `patch` takes it.

    Raises:
        ValueError: If the sparse video holds NaN or Inf.
    """
    errors, sparse, sparse_calls = [], [], 0
    for reference in references:
        with patch(pipe, plan, backend=backend) as handle:
            video, taken = generate(pipe, reference.case, settings)
        sparse_calls += handle.summary().sparse_calls
        sparse.append(taken)
        if not np.isfinite(video).all():
            raise ValueError(f"the plan gives NaN or Inf on {reference.case.prompt!r}")
        errors.append(float(np.mean((video - reference.video) ** 2)))
    levels = [-10 * np.log10(max(e, 1e-10)) for e in errors]
    pairs = Pairs([reference.taken for reference in references], sparse) if sparse_calls else None
    return Verified(
        float(np.mean(errors)),
        float(np.mean(levels)),
        pairs.speedup if pairs else 1.0,
        sum(taken.seconds for taken in sparse),
        pairs,
    )
