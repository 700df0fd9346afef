"""`verify=True`: the generation that a plan was learned from, made once more by that plan and compared.

The pipeline's class is replaced by a subclass of the same name, as only its `__call__` knows what a
generation was asked for. The user gets the dense result, after the sparse one was made too.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..integrations import attachment_of, components
from ..plan import Plan
from ..search.tune import RELAX_DB
from ..timing import Timer
from .options import AutoOptions

ROUNDS = 2  # sparse generations at most
BYTE = 255


class Measured(NamedTuple):
    """What a sparse generation came to.

    Args:
        mse: The mean squared difference of its pixels, which lie in 0..1.
        psnr_db: The PSNR in dB, at most 100.
        speedup: The dense generation's seconds over its own.
    """

    mse: float
    psnr_db: float
    speedup: float


class Verifiable(Protocol):
    """What learns from a pipeline's generations, see `auto.session.Session`."""

    options: AutoOptions
    verifying: bool

    @property
    def plan(self) -> Plan | None: ...

    def learned(self) -> float | None: ...
    def replan(self, mse: float) -> bool: ...
    def take(self, plan: Plan) -> None: ...
    def unverified(self, why: str) -> None: ...


def watch(pipe: Any) -> None:
    """Have the pipeline's calls verified, until `release`."""
    cls = type(pipe)

    class Watched(cls):
        @functools.wraps(cls.__call__)
        def __call__(self, *args: Any, **arguments: Any) -> Any:
            call = functools.partial(cls.__call__, self)
            attachment = attachment_of(next(iter(components(self).values())))
            session: Any = attachment and getattr(attachment.intercept, "session", None)
            if session is None:
                return call(*args, **arguments)
            return _generated(session, call, args, arguments)

        def __reduce_ex__(self, protocol: Any) -> Any:
            # a copy is of the stock class
            made, (_, *rest), *state = super().__reduce_ex__(protocol)
            return (made, (cls, *rest), *state)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Watched, name, getattr(cls, name))
    Watched.sparse_dit_stock_class = cls  # type: ignore[attr-defined]
    pipe.__class__ = Watched


def release(pipe: Any) -> None:
    """Give the pipeline its own class back; harmless if it has it."""
    stock = vars(type(pipe)).get("sparse_dit_stock_class")
    if stock is not None:
        pipe.__class__ = stock


def _generated(
    session: Verifiable,
    call: Callable[..., Any],
    args: Sequence[Any],
    arguments: Mapping[str, Any],
) -> Any:
    """The result of a pipeline's call; if a plan was learned from it, after that was verified."""
    generators = _generators([*args, *arguments.values()])
    begun = [generator.get_state() for generator in generators]
    default = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    device = torch.device("cuda" if on_device else "cpu")
    timer = Timer(device)
    result = call(*args, **arguments)
    dense = timer.stop().seconds
    recording = session.learned()
    if recording is None:
        return result
    reference = _pixels(result)
    quiet = {name: value for name, value in arguments.items() if not name.startswith("callback")}

    def sparse() -> Measured:
        with _again(generators, begun, default, on_device):
            timer = Timer(device)
            got = _pixels(call(*args, **quiet))
            seconds = timer.stop().seconds
        assert reference is not None and got is not None, "both are pixels"
        mse = float(np.mean((got - reference) ** 2))
        return Measured(mse, -10 * math.log10(max(mse, 1e-10)), (dense - recording) / seconds)

    if reference is None:
        session.unverified("what isn't pixels can't be compared")
        return result
    session.verifying = True
    try:
        _verify(session, sparse)
    except Exception as error:  # the dense result is there, and is what the user asked for
        session.unverified(f"the sparse generation failed: {error}")
    finally:
        session.verifying = False
    return result


def _verify(session: Verifiable, sparse: Callable[[], Measured]) -> None:
    """Measure the newest plan and correct it, until one is as good as asked for, or `ROUNDS` are over."""
    wanted = session.options.objective.min_psnr
    best: tuple[Measured, Plan] | None = None
    for _ in range(ROUNDS):
        plan, measured = session.plan, sparse()
        assert plan is not None, "it has been followed"
        if not math.isfinite(measured.mse):
            raise ValueError("it holds NaN or Inf")
        if best is None or _better((measured, plan), best, wanted):
            best = measured, plan
        good = wanted is None or wanted <= measured.psnr_db <= wanted + RELAX_DB
        if good or not session.replan(measured.mse):
            break
    assert best is not None, "one was measured"
    told = {"psnr_db": round(best[0].psnr_db, 3), "speedup": round(best[0].speedup, 4)}
    session.take(replace(best[1], measured={**told, "held_out_cases": 0}))


def _better(one: tuple[Measured, Plan], other: tuple[Measured, Plan], wanted: float | None) -> bool:
    """Whether a plan is to be taken before another: of those that are good enough the faster one.

    It is so by forecast, as two generations that differ little take as long as the machine is busy.
    """
    (mine, plan), (its, its_plan) = one, other
    if wanted is None or min(mine.psnr_db, its.psnr_db) < wanted:
        return mine.psnr_db > its.psnr_db
    return plan.forecast["speedup"] > its_plan.forecast["speedup"]


def _generators(values: Sequence[Any]) -> list[torch.Generator]:
    """All generators of random numbers among a call's arguments."""
    found = []
    for value in values:
        listed = value if isinstance(value, list | tuple) else [value]
        found += [one for one in listed if isinstance(one, torch.Generator)]
    return found


@contextlib.contextmanager
def _again(
    generators: Sequence[torch.Generator],
    begun: Sequence[torch.Tensor],
    default: torch.Tensor,
    on_device: Sequence[torch.Tensor],
) -> Iterator[None]:
    """Inside, random numbers are those of the generation before; afterwards they go on as if it weren't."""
    ended = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=range(len(on_device))):
        torch.set_rng_state(default)
        if on_device:
            torch.cuda.set_rng_state_all(list(on_device))
        try:
            for generator, state in zip(generators, begun, strict=True):
                generator.set_state(state)
            yield
        finally:
            for generator, state in zip(generators, ended, strict=True):
                generator.set_state(state)


def _pixels(result: Any) -> np.ndarray | None:
    """All videos or images of a pipeline's result as numbers in 0..1; None if it holds none."""
    for name in ("frames", "images"):
        if hasattr(result, name):
            result = getattr(result, name)
            break
    else:
        result = result[0] if isinstance(result, tuple) else result
    if isinstance(result, torch.Tensor):
        result = result.detach().float().cpu().numpy()
    try:
        pixels = np.asarray(result)
    except ValueError:  # of several sizes
        return None
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / BYTE
    if pixels.dtype.kind != "f" or not pixels.size:
        return None
    inside = np.nanmin(pixels) >= 0 and np.nanmax(pixels) <= 1  # latents are not
    return pixels.astype(np.float32) if inside else None
