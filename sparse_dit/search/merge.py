"""Profile files that several processes recorded, put together.

What a profile holds are sums over sampled rows, so adding them up is exact but for the rounding of the
additions. Candidates follow from all that was found: scores can only be added where the same finding
runs came before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .profile import LATER, ComponentProfile, Profile
from .profile_file import read_profile

SCORE = "score"


def merge_profiles(paths: Sequence[str | Path]) -> Profile:
    """The profile of all runs that are in the files, in the order of the files.

    Either no file holds scores: then what was found is added up. Or all of them have found on the same
    runs: then what was found is taken once, and the scores are added up.

    Args:
        paths: Profiles of the same model, settings and rows, no scoring run in two of them.

    Raises:
        ValueError: If there are no files, or they don't fit one another as said above.
        PlanError: If one is missing or damaged.
    """
    if not paths:
        raise ValueError("merging needs at least one profile file, got none")
    profiles = [read_profile(path) for path in paths]
    merged = profiles[0]
    for path, other in zip(paths[1:], profiles[1:], strict=True):
        if why := _misfit(merged, other):
            raise ValueError(f"{path} doesn't fit {paths[0]}: {why}")
        _add(merged, other)
    return merged


def found_on(profile: Profile) -> list[str]:
    """Labels of the runs that candidates follow from, in order."""
    return [label for label in profile.done if not label.startswith(SCORE)]


def _misfit(a: Profile, b: Profile) -> str | None:
    """Why two profiles can't be added up; None if they can."""
    if {n: p.config_hash for n, p in a.components.items()} != {
        n: p.config_hash for n, p in b.components.items()
    }:
        return "it is of another model; profile all prompts with one model"
    if (a.settings, a.rows) != (b.settings, b.rows):
        return "it was made with other settings or another number of rows; profile it again"
    for name, part in a.components.items():
        other = b.components[name]
        if part.found and other.found and _place(part) != _place(other):
            return f"{name} has other noise levels, layers or tokens there; profile it again"
    scored = [any(part.scores for part in p.components.values()) for p in (a, b)]
    if any(scored) and found_on(a) != found_on(b):
        return (
            "its scores are of other candidates; merge what was found first, then score with that"
        )
    if a.reference is not None and b.reference is not None:
        return "both hold a dense generation; merge only one of them"
    seen = set(a.done) - (set(found_on(a)) if any(scored) else set())
    if twice := sorted(seen & set(b.done)):
        return f"both hold the run {twice[0]!r}; merge each run once"
    return None


def _place(part: ComponentProfile) -> tuple[object, ...]:
    return part.known_layout.without_global(), tuple(part.sigmas), tuple(part.layers)


def _add(merged: Profile, other: Profile) -> None:
    """Add `other` into `merged`; they fit."""
    scored = any(p.scores for x in (merged, other) for p in x.components.values())
    for name, part in other.components.items():
        mine = merged.components[name]
        if not mine.found:
            merged.components[name] = part
            continue
        mine.note_layout(part.known_layout)
        later = {key: values for key, values in part.looks.items() if key[0] == LATER}
        mine.add(replace(part, found={}, looks=later) if scored else part)
        mine.pictures.update(part.pictures)
    known_labels = set(merged.done)
    merged.done += [label for label in other.done if label not in known_labels]
    merged.seconds += other.seconds
    merged.reference = merged.reference or other.reference


def without_scores(profile: Profile) -> Profile:
    """A profile that goes on from what was found; candidates made of it are shared."""
    parts = {
        name: replace(
            part,
            sigmas=list(part.sigmas),
            layers=list(part.layers),
            found=dict(part.found),
            scores={},
            pictures={},
            looks={key: value for key, value in part.looks.items() if key[0] != LATER},
        )
        for name, part in profile.components.items()
    }
    return replace(profile, components=parts, done=found_on(profile), seconds=0.0, reference=None)
