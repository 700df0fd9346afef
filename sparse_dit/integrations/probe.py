"""What a pipeline's first forward tells of a generation: token layout and noise levels, at no forward's cost.

The pipeline is called as for a generation, and stopped at the door of its transformer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from .attachment import components, image_only_layers
from .families import Family, family_of, forward_arguments, sigma_of
from .host import Seen
from .modular import call_parameters
from .pipeline import progress_bars_off

PROMPT = "a cat plays the piano"  # any: its words are no geometry


class _AtTheDoor(BaseException):
    """Ends a call of a pipeline before its transformer has run; no `Exception`, which a host would log."""

    def __init__(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.transformer = transformer
        self.arguments = arguments


def probe(pipe: Any, given: Mapping[str, Any], layout: TokenLayout | None = None) -> Seen:
    """Call a pipeline until it would run its transformer; see `Host.probe`.

    Raises:
        ValueError: If it needs other arguments, ends before, or its forward doesn't tell the token grid.
    """
    found = components(pipe)
    image_only = {name: image_only_layers(part) for name, part in found.items()}
    boundary = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    if layout is not None:
        return Seen(dict.fromkeys(found, layout), image_only, boundary=boundary)
    seen = _stopped(pipe, _call(pipe, given), found)
    layouts = {name: _layout(part, seen.arguments) for name, part in found.items()}
    times, whole = _timesteps(pipe)
    sigmas = _sigmas(times, whole, seen) if times else None
    return Seen(layouts, image_only, sigmas, len(times) or None, boundary)


def _layout(transformer: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """The token layout that a forward's arguments tell."""
    family, config = _family(transformer), transformer.config
    arrangement = family.arrange(config, arguments) if family.arrange else None
    layout = arrangement.layout if arrangement else family.layout(config, arguments)
    if layout is None:
        raise ValueError(
            f"the arguments of {type(transformer).__name__}'s forward must tell its token grid, and "
            "these don't: pass layout=, a TokenLayout of frames, rows and columns of tokens"
        )
    return layout


def _call(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The whole call.

    Raises:
        ValueError: If something is given that the pipeline doesn't take, or it needs something more.
    """
    parameters = call_parameters(pipe)
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if unknown := sorted(set(given) - set(parameters)) if not any_name else []:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}: leave out what it doesn't take"
        )
    wanted = {"output_type": "latent", "generator": torch.Generator("cpu").manual_seed(0)}
    if not any(name.startswith("prompt") for name in given):
        wanted["prompt"] = PROMPT
    call = {name: value for name, value in wanted.items() if name in parameters} | dict(given)
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing := sorted(set(needed) - set(call)):
        raise ValueError(
            f"{type(pipe).__name__} can't be called without {', '.join(missing)}: pass it in call=, or "
            "pass layout="
        )
    return call


@torch.no_grad()
def _stopped(pipe: Any, call: dict[str, Any], found: Mapping[str, nn.Module]) -> _AtTheDoor:
    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _AtTheDoor(module, forward_arguments(module, args, kwargs))

    with ExitStack() as stack:
        for transformer in found.values():
            stack.callback(transformer.register_forward_pre_hook(stop, with_kwargs=True).remove)
        stack.enter_context(progress_bars_off(pipe))
        stack.callback(getattr(pipe, "maybe_free_model_hooks", lambda: None))
        try:
            pipe(**call)
        except _AtTheDoor as seen:
            return seen
    raise ValueError(f"{type(pipe).__name__} ended before it ran its transformer: pass layout=")


def _family(transformer: nn.Module) -> Family:
    family = family_of(transformer)
    assert family is not None, "components() lets no other class through"
    return family


def _timesteps(pipe: Any) -> tuple[list[float], float]:
    """The scheduler's timesteps, once they are set, and the one that is all noise."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor):
        return [], 1000.0
    return timesteps.flatten().tolist(), float(
        getattr(scheduler.config, "num_train_timesteps", 1000)
    )


def _sigmas(times: list[float], whole: float, seen: _AtTheDoor) -> list[float] | None:
    """Noise levels of all steps, from timesteps in the form in which the first forward got its own."""
    family, config = _family(seen.transformer), seen.transformer.config
    first = sigma_of(family, config, seen.arguments)
    forms: tuple[Callable[[float], float], ...] = (
        lambda t: t,
        lambda t: t / whole,
        lambda t: (whole - t) / whole,
        lambda t: whole - t,
    )
    for form in forms:
        levels = [sigma_of(family, config, {family.timestep: form(t)}) for t in times]
        falls = all(b <= a + 1e-6 for a, b in itertools.pairwise(levels))
        if abs(levels[0] - first) < 0.01 and falls and levels[0] <= 1.001 and levels[-1] >= -0.001:
            return levels
    return None
