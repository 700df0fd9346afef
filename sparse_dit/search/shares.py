"""A profile made by several processes, each of which takes its share of the prompts.

Every run writes a file of its own. All processes wait for the runs that find, add them up, score with
that, and the first one adds up the scores. Runs are added in their order, whoever made them, so the
number of processes doesn't change the result. A stopped profile goes on from the files that are there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..generation import Case, GenerationSettings
from ..integrations import workload
from ..outputs import check_writable, rescued
from .profile import LATER, ComponentProfile, Profile
from .profile_file import read_profile, write_profile
from .profiling import Phase, phases_of, run_phase, started

Report = Callable[[str], None]


def profile_share(
    pipe: Any,
    cases: Sequence[Case],
    settings: GenerationSettings,
    path: str | Path,
    *,
    rank: int,
    world: int,
    barrier: Callable[[], object],
    rows: int = 64,
    report: Report | None = None,
) -> Path:
    """This process's share of a profile; see `profile_pipeline`, to whose result it is equal.

    Args:
        pipe: A diffusers pipeline of a supported class, not patched.
        cases: Calibration prompts and seeds, the same in all processes.
        settings: The size, steps and guidance of the profiling runs.
        rows: The sampled query rows for each head, layer, step and case.
        path: The whole profile, written by the first process; what it has already isn't run again.
            Files of single runs lie in a folder beside it until then.
        rank, world: Number of this process, and how many there are.
        barrier: Waits until all processes have called it.
        report: Called with a line of text for each run.

    Returns:
        Where the whole profile lies: at `path`, or at another place if it couldn't be written there in the
            end.

    Raises:
        ValueError: If there are no cases, or `path` holds a profile of something else.
        OSError: If `path` can't be written; before anything is run.
    """
    path = Path(path)
    check_writable(path, "path")
    if not cases:
        raise ValueError("profiling needs at least one prompt, got none")
    phases = phases_of(cases, beyond=workload(pipe, settings).has_larger)
    base = started(pipe, settings, rows, phases, path)
    left = phases[len(base.done) :]
    if not left:
        return path
    share = _Share(pipe, path, rank, world, report or (lambda text: None))
    empty = started(pipe, settings, rows, phases, None)
    files = share.run(empty, [phase for phase in left if phase.kind == "find"])
    barrier()
    first = [share.path] if base.done else []
    found = merge_profiles([*first, *files])
    if further := share.run(found, [phase for phase in left if phase.kind == "beyond"]):
        barrier()
        (found,) = map(read_profile, further)
    files = share.run(without_scores(found), [phase for phase in left if phase.kind == "score"])
    barrier()
    if rank == 0:
        scored = [share.path] if len(base.done) > len(found_on(base)) else []
        whole = merge_profiles([*scored, *files])
        whole.seconds += 0.0 if scored else found.seconds
        path = rescued(path, functools.partial(write_profile, whole), share.report)
        shutil.rmtree(share.folder)
    barrier()
    return path


@dataclass(frozen=True)
class _Share:
    """The part of the profiling runs that this process does."""

    pipe: Any
    path: Path
    rank: int
    world: int
    report: Report

    @property
    def folder(self) -> Path:
        """Where files of single runs lie until they are added up."""
        return self.path.with_name(f"{self.path.name}.parts")

    def run(self, base: Profile, phases: Sequence[Phase]) -> list[Path]:
        """Make this process's runs on top of `base`, a file each; the files of all runs."""
        files = [self._file(base, phase) for phase in phases]
        for phase, file in list(zip(phases, files, strict=True))[self.rank :: self.world]:
            if not file.exists():
                words = f"{phase.kind}: {phase.case.prompt}"
                self.report(f"process {self.rank + 1} of {self.world}, {words}")
                profile = without_scores(base)
                run_phase(self.pipe, profile, phase)
                write_profile(profile, file)
        return files

    def _file(self, base: Profile, phase: Phase) -> Path:
        """Named by all that the run depends on."""
        models = {name: part.config_hash for name, part in base.components.items()}
        about = [models, base.settings.to_dict(), base.rows, base.done, phase.label]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        return self.folder / f"{phase.kind}-{name}.safetensors"


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
    return [label for label in profile.done if not label.startswith("score")]


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
        mine.add(replace(part, found={}, beyond={}, looks=later) if scored else part)
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
            beyond=dict(part.beyond),
            scores={},
            pictures={},
            looks={key: value for key, value in part.looks.items() if key[0] != LATER},
        )
        for name, part in profile.components.items()
    }
    return replace(profile, components=parts, done=found_on(profile), seconds=0.0, reference=None)
