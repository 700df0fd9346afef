"""`geometric_plan`: a first plan for any supported model, from its geometry, without a search."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..index import pattern_index
from ..integrations import Seen, components, heads_of, host_of, self_attention_layers
from ..layout import TokenLayout
from ..plan import Plan, config_hash
from ..version import VERSION
from .geometry import DENSE_STEPS, NOTE, Reach, fitted, one_pattern

logger = logging.getLogger("sparse_dit")

CLOSE = 0.05  # relative deviation from the density asked for that is not worth a word
STEPS = 50  # where noise levels aren't known


def geometric_plan(
    pipe_or_transformer: Any,
    *,
    density: float = 0.5,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    dense_steps: float | None = None,
    call: Mapping[str, Any] | None = None,
    layout: TokenLayout | None = None,
) -> Plan:
    """A starting plan from geometry alone: nothing is measured, nothing of its quality is known.

    Every head sees its own and neighbouring frames, the first frame, the same place in all frames and all
    text, as far as the density allows; the rest is pooled. Of an image, it sees what is near. The noisiest
    steps run dense, and the first layer too where that costs no more than a quarter of the density. No
    forward of the transformer runs: the pipeline is stopped before its first.

    Args:
        pipe_or_transformer: A diffusers pipeline, or one of its transformers (which needs `layout`).
        density: Computed pairs / all pairs over a whole generation at this size, dense steps included. What
            is reached is the plan's `density`; more than 5 % off is logged and stands in its provenance.
        height, width, num_frames: Size that the density is for; the pipeline's own if None. The plan holds
            at other sizes too.
        steps: Denoising steps; the pipeline's own number if None.
        dense_steps: Share of the steps, from the noisiest on, that run dense; a quarter if None, but no more
            than half of the density.
        call: Further arguments of the pipeline's call, if it needs any: an image, say.
        layout: Where text, frames, rows and columns lie in the sequence. The pipeline then isn't called, and
            noise levels are taken as even.

    Raises:
        ValueError: For a density or share out of range, a size that isn't whole, a pipeline that needs
            further arguments, or a transformer without `layout`.
        TypeError: If there is no transformer.
        NotImplementedError: If the transformer's class is not supported.
    """
    check_shares(density, dense_steps)
    sizes = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": steps,
    }
    for name, value in sizes.items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    found = components(pipe_or_transformer)
    alone = isinstance(pipe_or_transformer, nn.Module)
    if layout is None and alone:
        raise ValueError(
            f"a {type(pipe_or_transformer).__name__} alone doesn't tell its token grid: pass the pipeline, "
            "or layout="
        )
    given = {name: value for name, value in sizes.items() if value is not None}
    seen = host_of(pipe_or_transformer).probe(
        pipe_or_transformer, {**given, **(call or {})}, layout
    )
    levels = seen.sigmas or _even(seen.steps or steps or STEPS)
    parts = _parts(found, seen, density)
    geometry = _fitted(next(iter(parts.values())), density, dense_steps, len(levels))
    schedule = _Schedule(levels, geometry.dense, seen.sigmas is not None)
    name = "" if alone else type(pipe_or_transformer).__name__
    return _planned(name, parts, geometry, schedule, density, seen.boundary)


def check_shares(
    density: float,
    dense_steps: float | None,
    names: tuple[str, str] = ("density", "dense_steps"),
) -> None:
    """Raise ValueError unless a plan can be asked for with these; `names` is what who asks calls them."""
    if not _number(density) or not 0 < density < 1:
        raise ValueError(f"{names[0]} must be a number above 0 and below 1, got {density!r}")
    if dense_steps is None:
        return
    if not _number(dense_steps) or not 0 <= dense_steps < density:
        raise ValueError(
            f"{names[1]} must be a share from 0 to less than the {names[0]} {density:g}, as dense steps "
            f"count in it, got {dense_steps!r}"
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _even(steps: int) -> list[float]:
    return [1 - n / steps for n in range(steps)]


@dataclass(frozen=True)
class _Schedule:
    """The noise levels of a generation's steps, and how many of them are dense.

    Args:
        sigmas: The noise levels of the steps, in order.
        dense: How many steps, from the first on, are dense.
        known: Whether the noise levels are the scheduler's own rather than assumed.
    """

    sigmas: Sequence[float]
    dense: int
    known: bool

    @property
    def share(self) -> float:
        """The share of the steps that are dense, in [0, 1]."""
        return self.dense / len(self.sigmas)

    @property
    def sigma_max(self) -> float:
        """The noise level between the last dense step and the first sparse one; 1 if none is dense."""
        if not self.dense:
            return 1.0
        level = (self.sigmas[self.dense - 1] + self.sigmas[self.dense]) / 2
        return min(1.0, max(1e-4, round(level, 4)))

    def shares(self, names: Sequence[str], boundary: float | None) -> dict[str, list[float]] | None:
        """The sparse share of a generation by component; None if who runs which step isn't known."""
        if len(names) == 1:
            return {names[0]: [round(1 - self.share, 6)]}
        if boundary is None or not self.known:
            return None
        first = sum(sigma >= boundary for sigma in self.sigmas[self.dense :])
        counts = (first, len(self.sigmas) - self.dense - first)
        return {n: [round(c / len(self.sigmas), 6)] for n, c in zip(names, counts, strict=True)}


@dataclass(frozen=True)
class _Part:
    """One transformer: what its layers see, and which of them are sparse."""

    transformer: Any
    layout: TokenLayout
    layers: tuple[str, ...]
    sparse: tuple[str, ...]
    seen: Mapping[str, TokenLayout]

    def pairs(self, layers: Sequence[str]) -> float:
        return float(sum(self.seen[layer].seq_len ** 2 for layer in layers))

    @property
    def dense_share(self) -> float:
        """The share of the query-key pairs that lie in layers which stay dense, in [0, 1]."""
        return 1 - self.pairs(self.sparse) / self.pairs(self.layers)

    @property
    def layouts(self) -> dict[TokenLayout, float]:
        """What sparse layers see, with the share of their pairs."""
        total, shares = self.pairs(self.sparse), {}
        for layer in self.sparse:
            layout = self.seen[layer]
            shares[layout] = shares.get(layout, 0.0) + layout.seq_len**2 / total
        return shares


def _parts(found: Mapping[str, nn.Module], known: Seen, density: float) -> dict[str, _Part]:
    parts = {}
    for name, transformer in found.items():
        layers = tuple(self_attention_layers(transformer))
        image, layout = known.image_only.get(name, ()), known.layouts[name]
        seen = {x: layout.without_global() if x in image else layout for x in layers}
        whole = _Part(transformer, layout, layers, layers, seen)
        first = _Part(transformer, layout, layers, layers[1:], seen)
        parts[name] = first if len(layers) > 1 and first.dense_share <= density / 4 else whole
    return parts


@dataclass(frozen=True)
class _Geometry:
    """What every head of a sparse layer computes, and how many steps are dense.

    Args:
        reach: How far heads see around themselves; see `Reach`.
        computed: Computed pairs / all pairs in a sparse layer.
        dense: The number of first steps that are dense.
        density: The density of a whole generation, its dense steps and layers included.
    """

    reach: Reach
    computed: float
    dense: int
    density: float


def _fitted(part: _Part, density: float, dense_steps: float | None, steps: int) -> _Geometry:
    """The reach that comes near to the density; what is left is made up by a step more or less."""
    share = min(DENSE_STEPS, density / 2) if dense_steps is None else dense_steps
    dense = math.floor(share * steps + 1e-9)
    sparse = (1 - dense / steps) * (1 - part.dense_share)
    reach = fitted(part.layouts, max(1 - (1 - density) / sparse, 1e-6))
    computed = sum(w * pattern_index(reach.pattern, x).density for x, w in part.layouts.items())
    every = 1 - (1 - part.dense_share) * (1 - computed)  # of a sparse step

    def whole(dense: int) -> float:
        return dense / steps + (1 - dense / steps) * every

    if dense_steps is None:
        near = range(math.ceil(dense / 2), min(steps - 1, dense + dense // 2) + 1)
        dense = min(near, key=lambda n: (abs(whole(n) - density), n), default=dense)
    return _Geometry(reach, computed, dense, round(whole(dense), 6))


def _planned(
    pipeline_class: str,
    parts: Mapping[str, _Part],
    geometry: _Geometry,
    schedule: _Schedule,
    density: float,
    boundary: float | None,
) -> Plan:
    """Transformers of one pipeline are alike: the first one's geometry is that of all."""
    components = {}
    for name, part in parts.items():
        heads = heads_of(part.transformer)
        components[name] = one_pattern(
            geometry.reach.pattern,
            {layer: heads[layer] for layer in part.sparse},
            model_class=type(part.transformer).__name__,
            config_hash=config_hash(part.transformer.config),
            layout=part.layout,
            sigma_max=schedule.sigma_max,
        )
    provenance: dict[str, Any] = {
        "note": NOTE,
        "sparse_dit": VERSION,
        "recipe": "sparse_dit.geometric_plan",
        "asked_density": density,
        "sparse_layer_density": round(geometry.computed, 6),
        "schedule": {
            "steps": len(schedule.sigmas),
            "dense_steps": schedule.dense,
            "noise_levels": "the scheduler's" if schedule.known else "assumed even",
        },
    }
    if (shares := schedule.shares(list(parts), boundary)) is not None:
        provenance["stage_shares"] = shares
    if abs(geometry.density - density) > CLOSE * density:
        layout = next(iter(parts.values())).layout
        logger.warning(
            "asked for a density of %g, reached %.3f: a sparse layer computes %.3f of the pairs of %s, the "
            "nearest that its tiles, text and pooled keys allow",
            density, geometry.density, geometry.computed, layout,
        )  # fmt: skip
    notes = {"forecast": {"note": NOTE}, "provenance": provenance}
    return Plan(pipeline_class, components, geometry.density, **notes)
