"""Run the stock pipeline over calibration cases and record every head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..generation import Case, GenerationSettings, generate
from ..integrations.diffusers import attach, components
from ..plan import config_hash
from .profile import ComponentProfile, Profile
from .profile_file import read_profile, write_profile
from .recorder import Recorder


def profile_pipeline(
    pipe: Any,
    cases: Sequence[Case],
    settings: GenerationSettings,
    *,
    rows: int = 64,
    path: str | Path | None = None,
    report: Callable[[int, int, str], None] | None = None,
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
    parts = {}
    for name, module in components(pipe).items():
        config: Any = module.config
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        parts[name] = ComponentProfile(type(module).__name__, config_hash(config), heads, head_dim)
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
