"""What a plan says about one transformer: a pattern for each layer, stage and head."""

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
Phase = Literal["any", "prefill", "decode"]
PHASES = ("any", "prefill", "decode")
Kind = Literal["diffusion_transformer", "language_model"]
DIFFUSION: Kind = "diffusion_transformer"
KINDS = (DIFFUSION, "language_model")


@dataclass(frozen=True)
class Stage:
    """A part of a generation: `progress_min < progress <= progress_max`; a minimum of 0 takes in 0 itself.

    Progress falls from 1, the start, to 0, the end. Of a diffusion model it is the noise level sigma =
    timestep / num_train_timesteps.

    Args:
        progress_max, progress_min: Bounds of progress, in [0, 1].
        branch: Which side of classifier-free guidance it is for: `"cond"`, `"uncond"` or `"any"`.
        phase: Which phase of a language model it is for: `"prefill"`, `"decode"` or `"any"`.

    Raises:
        PlanError: If the range is empty or not inside [0, 1].
    """

    progress_max: float
    progress_min: float
    branch: Branch = "any"
    phase: Phase = "any"

    def __post_init__(self) -> None:
        for name in ("progress_max", "progress_min"):
            object.__setattr__(self, name, _number(getattr(self, name), name))
        if not 0 <= self.progress_min < self.progress_max <= 1:
            raise PlanError(
                "a stage must have 0 <= progress_min < progress_max <= 1, "
                f"got progress_max {self.progress_max} and progress_min {self.progress_min}"
            )
        for name, known in (("branch", BRANCHES), ("phase", PHASES)):
            if (got := getattr(self, name)) not in known:
                raise PlanError(f"a stage's {name} must be one of {known}, got {short(got)}")

    def covers(self, progress: float, branch: str, phase: str = "any") -> bool:
        """Whether this stage applies. An `"any"` query is answered by `"any"` stages alone."""
        above = progress > self.progress_min or progress == self.progress_min == 0
        named = self.branch in ("any", branch) and self.phase in ("any", phase)
        return above and progress <= self.progress_max and named

    def overlaps(self, other: Stage) -> bool:
        """Whether both could apply to one call."""
        pairs = ((self.branch, other.branch), (self.phase, other.phase))
        same = all(a == b or "any" in (a, b) for a, b in pairs)
        return (
            same
            and self.progress_min < other.progress_max
            and other.progress_min < self.progress_max
        )

    def __str__(self) -> str:
        named = [name for name in (self.branch, self.phase) if name != "any"]
        return ", ".join([f"progress {self.progress_max:g} to {self.progress_min:g}", *named])


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
        heads: For each layer `(num_heads, head_dim)`: its heads and the channels of one. Layers that aren't
            in `layers` are left out.
        layout: Token layout at calibration; no limit on where the plan may run.
        stages: From the start of a generation to its end, disjoint. What no stage covers runs stock
            attention.
        layers: For each layer, by exact module path, the choices `[stage][head]`. A layer that
            isn't named runs stock attention.
        valid_tokens: Least and greatest number of tokens the plan is for (None: no limit). Below
            the first, dense attention is faster on the measured device.
        kind: `"diffusion_transformer"`, or `"language_model"`, whose stages may name a phase.

    Raises:
        PlanError: If anything is out of range, or a layer lacks a stage or a head.
    """

    model_class: str
    config_hash: str
    heads: Mapping[str, tuple[int, int]]
    layout: TokenLayout
    stages: tuple[Stage, ...]
    layers: Mapping[str, tuple[tuple[HeadChoice, ...], ...]]
    valid_tokens: tuple[int, int | None] = (0, None)
    kind: Kind = DIFFUSION
    _heads: dict[str, tuple[tuple[Pattern, ...], ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        matches("model_class", self.model_class, schema.CLASS_NAME)
        matches("config_hash", self.config_hash, schema.SHA256)
        if self.kind not in KINDS:
            raise PlanError(f"kind must be one of {KINDS}, got {short(self.kind)}")
        self._check_tokens()
        self._check_stages()
        if len(self.layers) > schema.MAX_LAYERS:
            raise PlanError(f"layers: at most {schema.MAX_LAYERS}, got {len(self.layers)}")
        for layer, stages in self.layers.items():
            matches("layers", layer, schema.LAYER_PATH)
            if layer not in self.heads:
                raise PlanError(f'heads."{layer}": must be there as in layers; add it')
            num_heads, head_dim = self.heads[layer]
            _count(f'heads."{layer}": num_heads', num_heads, schema.MAX_HEADS)
            _count(f'heads."{layer}": head_dim', head_dim, schema.MAX_HEAD_DIM)
            check_layer(f'layers."{layer}"', stages, len(self.stages), num_heads)
            for number, heads in enumerate(stages):
                place, listed = f'layers."{layer}"[{number}]', [head.pattern for head in heads]
                _check_alike(place, listed)
                if self.kind != DIFFUSION:
                    _check_causal(place, listed)
            self._heads[layer] = tuple(tuple(head.pattern for head in heads) for heads in stages)
        object.__setattr__(self, "heads", {layer: self.heads[layer] for layer in self.layers})

    def patterns(
        self, layer: str, progress: float | None, branch: str = "any", phase: str = "any"
    ) -> tuple[Pattern, ...] | None:
        """One pattern a head for a call of `layer`, or None where stock attention must run.

        Args:
            layer: Exact module path.
            progress: Progress of the call, for a diffusion model its sigma; None if it isn't known (no
                stage applies then).
            branch: `"cond"`, `"uncond"`, or `"any"` where both are in one batch.
            phase: `"prefill"` or `"decode"` of a language model.

        Returns:
            A pattern for each of the layer's heads; the same tuple for every call in a stage.
        """
        heads = self._heads.get(layer)
        stage = self.stage(progress, branch, phase)
        return None if heads is None or stage is None else heads[stage]

    def stage(self, progress: float | None, branch: str = "any", phase: str = "any") -> int | None:
        """Number of the stage that applies, or None."""
        if branch not in BRANCHES:
            raise ValueError(f"branch must be one of {BRANCHES}, got {branch!r}")
        if progress is None:
            return None
        stages = enumerate(self.stages)
        return next((i for i, s in stages if s.covers(progress, branch, phase)), None)

    @property
    def total_heads(self) -> int:
        """Heads of all layers that the plan names together."""
        return sum(num_heads for num_heads, _ in self.heads.values())

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
        order = [
            (-s.progress_max, BRANCHES.index(s.branch), PHASES.index(s.phase)) for s in self.stages
        ]
        if order != sorted(order):
            raise PlanError("stages: must be ordered from high to low progress_max; sort them")
        if self.kind == DIFFUSION and any(stage.phase != "any" for stage in self.stages):
            raise PlanError("stages: only those of a language_model have a phase; leave it out")
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


def _check_alike(place: str, patterns: list[Pattern]) -> None:
    """Raise PlanError if some heads are estimated in causal order and others are not."""
    sparse = [pattern for pattern in patterns if not pattern.is_dense]
    if len({pattern.is_causal for pattern in sparse}) > 1:
        names = sorted({pattern.name for pattern in sparse})
        raise PlanError(
            f"{place}: heads must all be estimated or dense, or none of them estimated, got {names}"
        )


def _check_causal(place: str, patterns: list[Pattern]) -> None:
    """Raise PlanError if a language model's heads are to find blocks of a grid."""
    if names := sorted({p.name for p in patterns if p.is_estimated and not p.is_causal}):
        raise PlanError(f"{place}: only heads of a {DIFFUSION} find blocks of a grid, got {names}")


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
