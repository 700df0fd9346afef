"""Profile: what the search knows of a model's heads, measured through the stock pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..generation import Case, GenerationSettings, generate
from ..integrations.diffusers import attach, components
from ..layout import TokenLayout
from ..patterns import Pattern
from ..plan import config_hash
from .candidates import all_candidates
from .profile_file import read_profile, write_profile
from .recorder import Recorder
from .statistics import HeadStatistics


@dataclass
class ComponentProfile:
    """One transformer's heads at one layout; S recorded noise levels, H heads.

    Args:
        model_class, config_hash, num_heads, head_dim: What the profile is of.
        layout: Size at calibration.
        sigmas: Noise levels recorded, falling, `[S]`.
        layers: Module paths, in order of execution.
        found: For `(level, layer)` a list over heads of their statistics (discovery).
        scores: For `(level, layer)` the accumulators `error`, `error_squared`, `recall` `[H, K]` and
            `norm`, `rows` `[H]` (scoring); see `statistics.score`.
        pictures: For `(layer, token order)`, `[H, R, C]`: attention of the sampled rows (in that order)
            over its tiles, at the middle level.
    """

    model_class: str
    config_hash: str
    num_heads: int
    head_dim: int
    layout: TokenLayout | None = None
    sigmas: list[float] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    found: dict[tuple[int, str], list[HeadStatistics]] = field(default_factory=dict)
    scores: dict[tuple[int, str], dict[str, Tensor]] = field(default_factory=dict)
    pictures: dict[tuple[str, Tile], Tensor] = field(default_factory=dict)
    _candidates: dict[tuple[int, str], list[tuple[Pattern, ...]]] = field(
        default_factory=dict, repr=False
    )

    @property
    def known_layout(self) -> TokenLayout:
        """The layout; ValueError before anything was recorded."""
        if self.layout is None:
            raise ValueError(
                f"no self-attention call of {self.model_class} could be recorded: its token grid "
                "is unknown at these arguments, or it asks for more than plain attention"
            )
        return self.layout

    def candidates(self, level: int, layer: str) -> list[tuple[Pattern, ...]]:
        """Candidates of each head of a layer at a noise level: `[H][K]` patterns."""
        key = (level, layer)
        if key not in self._candidates:
            self._candidates[key] = [
                all_candidates(head, self.known_layout) for head in self.found[key]
            ]
        return self._candidates[key]

    def relative_error(self, level: int, layer: str) -> Tensor:
        """Squared relative L2 error of each head's output for each candidate, `[H, K]`."""
        scores = self.scores[level, layer]
        return scores["error"] / scores["norm"][:, None].clamp_min(1e-20)

    def standard_error(self, level: int, layer: str) -> Tensor:
        """One standard error of `relative_error`, from the spread over sampled rows, `[H, K]`."""
        scores = self.scores[level, layer]
        rows = scores["rows"][:, None]
        variance = (scores["error_squared"] / rows - (scores["error"] / rows).square()).clamp_min(0)
        return (variance * rows).sqrt() / scores["norm"][:, None].clamp_min(1e-20)


@dataclass
class Profile:
    """A pipeline's profile: one `ComponentProfile` a transformer, and how it was made.

    Args:
        components: By component name.
        settings, rows: Of the profiling runs.
        done: Labels of the runs that are in it, in order.
        seconds: That these runs took.
    """

    components: dict[str, ComponentProfile]
    settings: GenerationSettings
    rows: int
    done: list[str] = field(default_factory=list)
    seconds: float = 0.0


def profile_pipeline(
    pipe: Any,
    cases: Sequence[Case],
    settings: GenerationSettings,
    *,
    rows: int = 96,
    path: str | Path | None = None,
    report: Any = None,
) -> Profile:
    """Run the stock pipeline over the cases and record every head.

    The first half of the cases (at least one) finds where heads look, the others measure how well
    every candidate does; with a single case, it is run twice with different sampled rows and noise.

    Args:
        pipe: A diffusers pipeline of a supported class, not patched.
        cases: Calibration prompts and seeds.
        settings: Size and steps of the profiling runs; few steps suffice, as plans go by noise level.
        rows: Sampled query rows for each head, layer, step and case.
        path: Where the profile is saved after each case; an existing one of the same model and
            settings is taken up where it stopped.
        report: Called with `(done, total, text)`.

    Raises:
        ValueError: If there are no cases or rows, or `path` holds a profile of something else.
        PlanError: If the file at `path` is damaged.
    """
    if not cases:
        raise ValueError("profiling needs at least one prompt, got none")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows must be a whole number >= 1, got {rows!r}")
    phases = _phases(cases)
    labels = [label for label, _, _ in phases]
    profile = _started(pipe, settings, rows)
    if path is not None and Path(path).exists():
        profile = _resumed(read_profile(path), profile, labels, path)
    for number in range(len(profile.done), len(phases)):
        label, phase, case = phases[number]
        if report:
            report(number, len(phases), f"{phase}: {case.prompt}")
        profile.seconds += _run(pipe, profile, phase, case)
        profile.done.append(label)
        if path is not None:
            write_profile(profile, path)
    if report:
        report(len(phases), len(phases), "profiled")
    return profile


def _phases(cases: Sequence[Case]) -> list[tuple[str, str, Case]]:
    """Label, kind (`"find"` or `"score"`) and case of each profiling run."""
    if len(cases) == 1:
        cases = [cases[0], Case(cases[0].prompt, cases[0].seed + 1)]
    half = len(cases) // 2
    kinds = ["find"] * half + ["score"] * (len(cases) - half)
    return [
        (f"{kind}|{case.seed}|{case.prompt}", kind, case)
        for kind, case in zip(kinds, cases, strict=True)
    ]


def _started(pipe: Any, settings: GenerationSettings, rows: int) -> Profile:
    parts = {
        name: ComponentProfile(type(module).__name__, config_hash(module.config), *_heads(module))
        for name, module in components(pipe).items()
    }
    return Profile(parts, settings, rows)


def _resumed(profile: Profile, fresh: Profile, labels: list[str], path: str | Path) -> Profile:
    """The stored profile, if what is to be profiled now goes on from it."""
    stored, wanted = (
        {name: part.config_hash for name, part in p.components.items()} for p in (profile, fresh)
    )
    same = {
        "model": stored == wanted,
        "size, steps or guidance": profile.settings == fresh.settings,
        "number of rows": profile.rows == fresh.rows,
        "list of prompts": profile.done == labels[: len(profile.done)],
    }
    if other := [what for what, equal in same.items() if not equal]:
        raise ValueError(
            f"{path} is the profile of another {' and '.join(other)}; name another file or delete it"
        )
    return profile


def _heads(module: Any) -> tuple[int, int]:
    config = module.config
    return config.num_attention_heads, config.attention_head_dim


def _run(pipe: Any, profile: Profile, phase: str, case: Case) -> float:
    """One generation with a recorder on every transformer; all of it undone afterwards."""
    attachments = []
    try:
        for name, module in components(pipe).items():
            recorder = Recorder(profile.components[name], phase, profile.rows, case.seed)
            attachments.append(attach(module, recorder))
        return generate(pipe, case, profile.settings)[1]
    finally:
        for attachment in attachments:
            attachment.detach()
