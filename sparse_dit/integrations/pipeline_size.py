"""Which sizes a pipeline can generate, all of the rule at once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..generation import GenerationSettings
from ..words import option
from .modular import FrameRule, frame_rule

GOOD = 1024  # pixels that every host takes: what it refuses with them isn't about the size
_SPATIAL = (
    *("vae_scale_factor_spatial", "vae_spatial_scale_factor", "vae_spatial_compression_ratio"),
    "vae_scale_factor",
)
_TEMPORAL = (
    *("vae_scale_factor_temporal", "vae_temporal_scale_factor", "vae_temporal_compression_ratio"),
)


@dataclass(frozen=True)
class SizeRule:
    """What sides and frames must be.

    Attributes:
        height, width: Pixels must be multiples of these.
        frames: Number of frames `frames * k + first`.
        first: See `frames`.
        rounded: Whether the pipeline makes the next such number of others, instead of failing.
        of_frames: All that is to be said of frames where their number is bounded; None where it isn't.
    """

    height: int = 1
    width: int = 1
    frames: int = 1
    first: int = 1
    rounded: bool = True
    of_frames: FrameRule | None = None

    def __str__(self) -> str:
        sides = f"{option('height')} must be a multiple of {self.height}, {option('width')} of {self.width}"
        if self.height == self.width:
            sides = (
                f"{option('height')} and {option('width')} must each be a multiple of {self.height}"
            )
        if self.of_frames is not None:
            return f"{sides}, and {option('num_frames')} {self.of_frames}"
        if self.frames == 1:
            return sides
        form = f"{option('num_frames')} {self.frames} k + {self.first}"
        return f"{sides}, and {form}" + " (others are rounded to it)" * self.rounded

    def nearest(self, settings: GenerationSettings) -> str:
        """A size that will do, as options or arguments."""
        height = max(1, round(settings.height / self.height)) * self.height
        width = max(1, round(settings.width / self.width)) * self.width
        words = {"height": height, "width": width}
        if (bound := self.of_frames) is not None:
            frames = bound.rounded(settings.num_frames)
            words["num_frames"] = min(max(frames, bound.least), bound.most)
        elif not self.rounded and (settings.num_frames - self.first) % self.frames:
            steps = max(0, round((settings.num_frames - self.first) / self.frames))
            words["num_frames"] = steps * self.frames + self.first
        return ", ".join(f"{option(name)} {value}" for name, value in words.items())


def check_size(pipe: Any, settings: GenerationSettings, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, with the whole rule, if the pipeline can't make this size.

    Args:
        pipe: A pipeline, which needs no weights for this.
        settings: What is to be generated.
        arguments: The arguments that the pipeline is called with, by name.
    """
    height, width = settings.height, settings.width
    own = _transformer_rule(pipe)
    fits = not _odd(height, own.height, pipe) and not _odd(width, own.width, pipe)
    if not own.rounded and (settings.num_frames // _of(pipe, _TEMPORAL) + 1) % own.latent_frames:
        fits = False
    bound = frame_rule(pipe)
    if bound is not None and not bound.allows(settings.num_frames):
        fits = False
    refused = _refused(pipe, arguments, height, width)
    if fits and refused is None:
        return
    if refused is not None and _refused(pipe, arguments, GOOD, GOOD) is not None:
        raise ValueError(f"{type(pipe).__name__}: {refused}")
    rule = _rule(pipe, own, arguments)
    got = ("height", "width", *(["num_frames"] if "num_frames" in arguments else []))
    words = ", ".join(f"{option(name)} {getattr(settings, name)}" for name in got)
    raise ValueError(f"for this model {rule}; got {words}: try {rule.nearest(settings)}")


@dataclass(frozen=True)
class _Transformer:
    """Pixels and latent frames that its patches need multiples of."""

    height: int
    width: int
    latent_frames: int
    rounded: bool


def _rule(pipe: Any, own: _Transformer, arguments: Mapping[str, Any]) -> SizeRule:
    """What the transformer needs together with what the pipeline refuses."""
    sides = [own.height, own.width]
    for number in range(2):
        step = 1
        while step < GOOD:  # `GOOD + step` is a multiple of the powers of two up to `step` alone
            size = [GOOD, GOOD]
            size[number] += step
            if _refused(pipe, arguments, *size) is None:
                break
            step *= 2
        sides[number] = math.lcm(sides[number], step)
    (height, width), scale = sides, _of(pipe, _TEMPORAL)
    if "num_frames" not in arguments:
        return SizeRule(height, width)
    if (bound := frame_rule(pipe)) is not None:
        return SizeRule(height, width, of_frames=bound)
    if own.rounded:
        return SizeRule(height, width, scale)
    first = scale * (own.latent_frames - 1) + (scale > 1)
    return SizeRule(height, width, scale * own.latent_frames, first, rounded=False)


def _transformer_rule(pipe: Any) -> _Transformer:
    """Wan patchifies frames too; a size that doesn't divide fails deep inside with shapes only."""
    transformer = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    config = getattr(transformer, "config", None)
    patch = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", None) or 1
    if isinstance(patch, int):
        patch = (1, patch, patch)
    elif len(patch) == 1:
        patch = (1, *patch, *patch)
    elif len(patch) == 2:
        patch = (1, *patch)
    scale = _of(pipe, _SPATIAL)
    return _Transformer(scale * patch[1], scale * patch[2], patch[0], rounded=patch[0] == 1)


def _odd(side: int, step: int, pipe: Any) -> bool:
    """Whether the latents of a side can't be cut into patches; hosts round down to whole latents."""
    scale = _of(pipe, _SPATIAL)
    return (side // scale) % (step // scale) != 0 or side < step


def _of(pipe: Any, names: tuple[str, ...]) -> int:
    """The first of these numbers that a pipeline has; 1 if none."""
    found = (getattr(pipe, name, None) for name in names)
    return next((number for number in found if isinstance(number, int) and number > 0), 1)


def _default(pipe: Any, name: str) -> Any:
    """What the pipeline's call, or that of a class that it extends, takes for what isn't given."""
    for kind in type(pipe).__mro__:
        if "__call__" not in vars(kind):
            continue
        parameters = inspect.signature(vars(kind)["__call__"]).parameters
        if name in parameters and parameters[name].default is not inspect.Parameter.empty:
            return parameters[name].default
    return None


def _refused(pipe: Any, arguments: Mapping[str, Any], height: int, width: int) -> str | None:
    """What the pipeline's own check says of these arguments at a size; None if it has nothing to say."""
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return None
    given = {**arguments, "height": height, "width": width}
    values = {}
    for name, parameter in inspect.signature(check).parameters.items():
        if name in given:
            values[name] = given[name]
        elif parameter.default is inspect.Parameter.empty:
            values[name] = _default(pipe, name)
    try:
        check(**values)
    except ValueError as error:
        return " ".join(str(error).split())
    except (TypeError, AttributeError):  # wants what text or image to video doesn't have
        return None
    return None
