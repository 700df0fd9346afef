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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..generation import Case, GenerationSettings
from ..integrations import workload
from ..outputs import check_writable, rescued
from .merge import found_on, merge_profiles, without_scores
from .profile import Profile
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
