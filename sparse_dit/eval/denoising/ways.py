"""The ways that are compared: our rules and published ones, each with the numbers that are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...denoising import DENOISING
from ...integrations import attached, components
from ...making import Making
from ...patch import Handle, patch
from ...plan import Plan
from ..baselines.denoising import Baseline, sparsed_code, streaming_llm, window
from .measure import Account, Way

KEPT = (0.1, 0.2, 0.3, 0.5)


class Patched:
    """The account of a patch."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    @property
    def _ran(self) -> list[Any]:
        return [ran for part in self._handle.ran.values() for ran in part]

    @property
    def pairs(self) -> float:
        """Query-key pairs of dense attention."""
        return float(sum(ran.pairs for ran in self._ran))

    @property
    def computed(self) -> float:
        """Those that were computed."""
        return float(sum(ran.computed for ran in self._ran))

    @property
    def kept_bytes(self) -> int:
        """Memory of the indices that are kept at present."""
        return self._handle.kept_bytes

    def time_making(self) -> Making:
        """See `Handle.time_making`."""
        return self._handle.time_making()


@dataclass(frozen=True)
class Method:
    """A rule.

    Args:
        source: What it is, with its paper.
        way: How a pipeline is run by it, for a number out of `numbers`.
        numbers: Its parameter's values that are tried; the density rises with them.
    """

    source: str
    way: Callable[[Any, float], Way]
    numbers: Sequence[float] = KEPT


def of_plan(pipe: Any, plan: Plan) -> Way:
    """A plan, patched."""

    @contextmanager
    def way() -> Iterator[Account]:
        with patch(pipe, plan) as handle:
            yield Patched(handle)

    return way


def _rule(name: str) -> Callable[[Any, float], Way]:
    def of(pipe: Any, number: float) -> Way:
        option: dict[str, Any] = {DENOISING[name].option[0]: number}

        @contextmanager
        def way() -> Iterator[Account]:
            with patch(pipe, name, **option) as handle:
                yield Patched(handle)

        return way

    return of


def _baseline(chosen: Any, block: int = 64, dense_above: float = 1.0) -> Callable[..., Way]:
    def of(pipe: Any, number: float) -> Way:
        @contextmanager
        def way() -> Iterator[Account]:
            one = Baseline(number, chosen, block, dense_above)
            ((name, _),) = components(pipe).items()
            with attached(pipe, {name: one}):
                yield one

        return way

    return of


METHODS: dict[str, Method] = {
    **{
        name: Method(rule.source, _rule(name), (0.1, 0.3, 1.0) if name == "online" else KEPT)
        for name, rule in DENOISING.items()
    },
    "sparsed-code": Method(
        "SparseD's released code (github.com/INV-WZQ/SparseD 52155b4), whose choice departs from its paper",
        _baseline(sparsed_code, 128, 0.8),
    ),
    "sliding-window": Method("a window of keys on either side, no sinks", _baseline(window)),
    "streaming-llm": Method(
        "StreamingLLM (arXiv 2309.17453): first keys and a window, on either side here",
        _baseline(streaming_llm),
    ),
}
