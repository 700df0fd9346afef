"""What a plan says about one transformer: a pattern for each layer, noise level and head."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, Literal

from ..layout import TokenLayout
from ..patterns import Pattern
from . import schema
from .errors import PlanError, short

Branch = Literal["any", "cond", "uncond"]
BRANCHES = ("any", "cond", "uncond")


@dataclass(frozen=True)
class Stage:
    """A range of noise levels: `sigma_min < sigma <= sigma_max`; `sigma_min` 0 takes in 0 itself.

    Args:
        sigma_max, sigma_min: Bounds of sigma = timestep / num_train_timesteps, in [0, 1].
        branch: Which side of classifier-free guidance it is for: `"cond"`, `"uncond"` or `"any"`.

    Raises:
        PlanError: If the range is empty or not inside [0, 1].
    """

    sigma_max: float
    sigma_min: float
    branch: Branch = "any"

    def __post_init__(self) -> None:
        for name in ("sigma_max", "sigma_min"):
            object.__setattr__(self, name, _number(getattr(self, name), name))
        if not 0 <= self.sigma_min < self.sigma_max <= 1:
            raise PlanError(
                "a stage must have 0 <= sigma_min < sigma_max <= 1, "
                f"got sigma_max {self.sigma_max} and sigma_min {self.sigma_min}"
            )
        if self.branch not in BRANCHES:
            raise PlanError(f"a stage's branch must be one of {BRANCHES}, got {short(self.branch)}")

    def covers(self, sigma: float, branch: str) -> bool:
        """Whether this stage applies. An `"any"` query is answered by `"any"` stages alone."""
        above = sigma > self.sigma_min or sigma == self.sigma_min == 0
        return above and sigma <= self.sigma_max and self.branch in ("any", branch)

    def overlaps(self, other: Stage) -> bool:
        """Whether both could apply to one call."""
        same = self.branch == other.branch or "any" in (self.branch, other.branch)
        return same and self.sigma_min < other.sigma_max and other.sigma_min < self.sigma_max

    def __str__(self) -> str:
        text = f"sigma {self.sigma_max:g} to {self.sigma_min:g}"
        return text if self.branch == "any" else f"{text}, {self.branch}"


@dataclass(frozen=True)
class HeadChoice:
    """The pattern of one head in one stage, and what the search knows of it.

    Args:
        pattern: The query-key pairs that the head computes.
        error: Relative L2 error that was expected of the head, behind the layer's output projection (of its
            own output in plans whose provenance doesn't say so); None if unknown.
        runner_up: The second choice, or None.
        runner_up_error: Its error, or None.

    Raises:
        PlanError: If an error is not a finite number >= 0, or belongs to no runner-up.
    """

    pattern: Pattern
    error: float | None = None
    runner_up: Pattern | None = None
    runner_up_error: float | None = None

    def __post_init__(self) -> None:
        for name in ("error", "runner_up_error"):
            value = getattr(self, name)
            if value is not None:
                value = _number(value, name)
                if value < 0:
                    raise PlanError(f"{name} must be >= 0, got {value}")
                object.__setattr__(self, name, value)
        if self.runner_up is None and self.runner_up_error is not None:
            raise PlanError("runner_up_error must be None without a runner_up")


@dataclass(frozen=True)
class ComponentPlan:
    """The choices for one transformer of a pipeline.

    Args:
        model_class: Name of its class.
        config_hash: `config_hash` of its configuration.
        num_heads, head_dim: Heads of its attention layers, channels of one.
        layout: Token layout at calibration; no limit on where the plan may run.
        stages: Noise levels, from high to low, disjoint. What no stage covers runs stock attention.
        layers: For each layer, by exact module path, the choices `[stage][head]`. A layer that
            isn't named runs stock attention.
        valid_tokens: Least and greatest number of tokens the plan is for (None: no limit). Below
            the first, dense attention is faster on the measured device.

    Raises:
        PlanError: If anything is out of range, or a layer lacks a stage or a head.
    """

    model_class: str
    config_hash: str
    num_heads: int
    head_dim: int
    layout: TokenLayout
    stages: tuple[Stage, ...]
    layers: Mapping[str, tuple[tuple[HeadChoice, ...], ...]]
    valid_tokens: tuple[int, int | None] = (0, None)
    _heads: dict[str, tuple[tuple[Pattern, ...], ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        matches("model_class", self.model_class, schema.CLASS_NAME)
        matches("config_hash", self.config_hash, schema.SHA256)
        _count("num_heads", self.num_heads, schema.MAX_HEADS)
        _count("head_dim", self.head_dim, schema.MAX_HEAD_DIM)
        self._check_tokens()
        self._check_stages()
        if len(self.layers) > schema.MAX_LAYERS:
            raise PlanError(f"layers: at most {schema.MAX_LAYERS}, got {len(self.layers)}")
        for layer, stages in self.layers.items():
            matches("layers", layer, schema.LAYER_PATH)
            check_layer(f'layers."{layer}"', stages, len(self.stages), self.num_heads)
            self._heads[layer] = tuple(tuple(head.pattern for head in heads) for heads in stages)

    def patterns(
        self, layer: str, sigma: float | None, branch: str = "any"
    ) -> tuple[Pattern, ...] | None:
        """One pattern a head for a call of `layer`, or None where stock attention must run.

        Args:
            layer: Exact module path.
            sigma: timestep / num_train_timesteps; None if it isn't known (no stage applies then).
            branch: `"cond"`, `"uncond"`, or `"any"` where both are in one batch.

        Returns:
            `num_heads` patterns; the same tuple for every call in a stage.
        """
        heads = self._heads.get(layer)
        stage = self.stage(sigma, branch)
        return None if heads is None or stage is None else heads[stage]

    def stage(self, sigma: float | None, branch: str = "any") -> int | None:
        """Number of the stage that applies, or None."""
        if branch not in BRANCHES:
            raise ValueError(f"branch must be one of {BRANCHES}, got {branch!r}")
        if sigma is None:
            return None
        return next((i for i, s in enumerate(self.stages) if s.covers(sigma, branch)), None)

    @functools.cached_property
    def distinct_patterns(self) -> tuple[Pattern, ...]:
        """Every pattern once: first those in use, then runners-up, each in order of appearance."""
        heads = [head for stages in self.layers.values() for stage in stages for head in stage]
        used = dict.fromkeys(head.pattern for head in heads)
        spare = dict.fromkeys(head.runner_up for head in heads if head.runner_up is not None)
        return tuple(used | spare)

    def _check_tokens(self) -> None:
        low, high = self.valid_tokens
        for name, value in (("minimum", low), ("maximum", high)):
            if value is not None or name == "minimum":
                _count(f"valid_tokens: the {name}", value, schema.MAX_TOKENS, least=0)
        if high is not None and high < low:
            raise PlanError(
                f"valid_tokens: the maximum must be >= the minimum, got {low} and {high}"
            )

    def _check_stages(self) -> None:
        if not 1 <= len(self.stages) <= schema.MAX_STAGES:
            raise PlanError(f"stages: must be 1 to {schema.MAX_STAGES}, got {len(self.stages)}")
        order = [(-stage.sigma_max, BRANCHES.index(stage.branch)) for stage in self.stages]
        if order != sorted(order):
            raise PlanError("stages: must be ordered from high to low sigma_max; sort them")
        for i, stage in enumerate(self.stages):
            for j in range(i):
                if stage.overlaps(self.stages[j]):
                    raise PlanError(
                        f"stages[{i}]: must not overlap stages[{j}], "
                        f"got {stage} and {self.stages[j]}"
                    )


def check_layer(place: str, stages: Collection[Sized], num_stages: int, num_heads: int) -> None:
    """Raise PlanError unless a layer has its stages, and each of them its heads.

    Args:
        place: Where the layer stands in the plan, for the message.
        stages: The heads that the layer has at each stage.
        num_stages, num_heads: How many stages it must have, and heads at each of them.
    """
    if len(stages) != num_stages:
        raise PlanError(f"{place}: must have {num_stages} stages, got {len(stages)}")
    for i, heads in enumerate(stages):
        if len(heads) != num_heads:
            raise PlanError(f"{place}[{i}]: must have {num_heads} heads, got {len(heads)}")


def matches(name: str, value: Any, form: str) -> None:
    """Raise PlanError unless `value` is text of that form."""
    if not isinstance(value, str) or len(value) > 256 or not re.fullmatch(form.rstrip("$"), value):
        raise PlanError(f"{name}: must match {form}, got {short(value)}")


def _count(name: str, value: Any, greatest: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= greatest:
        raise PlanError(f"{name} must be an integer from {least} to {greatest}, got {short(value)}")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlanError(f"{name} must be a finite number, got {short(value)}")
    return float(value)
