"""Run the stock pipeline over calibration cases and record every head."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..generation import Case, GenerationSettings
from ..integrations import components, heads_of, workload
from ..on_cpu import on_cpu
from ..outputs import check_writable, rescued
from ..plan import config_hash
from ..timing import Taken
from ..words import option
from .profile import ComponentProfile, Profile
from .profile_file import only_writer, read_profile, write_profile
from .projection import projections
from .recorder import Recorder, profile_larger
from .sampling import turns
from .verify import dense_reference

TURNS = 2  # steps of a kept generation that are recorded, for each step of the other runs


@on_cpu
def profile_pipeline(
    pipe: Any,
    cases: Sequence[Case],
    settings: GenerationSettings,
    *,
    rows: int = 64,
    reference_steps: int | None = None,
    path: str | Path | None = None,
    beyond: bool = True,
    report: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Profile:
    """Run the stock pipeline over the cases and record every head.

    The first half of the cases (at least one) finds where heads look, the others measure how well
    every candidate does; with a single case, it is run twice with different sampled rows and noise.

    Args:
        pipe: A diffusers pipeline of a supported class, not patched.
        cases: Calibration prompts and seeds.
        settings: Size and steps of the profiling runs; few steps suffice, as plans go by noise level.
        rows: Sampled query rows for each head, layer, step and case; twice as many where candidates are
            found, which runs without guidance.
        reference_steps: If given, the last case is generated with so many steps while it is scored, and
            its video is kept as `Profile.reference`: it needn't be generated densely once more. The
            rows are then spread over `TURNS` times as many steps as `settings` have, and over the halves of
            guidance in turn.
        path: Where the profile is saved after each case; an existing one of the same model and
            settings is taken up where it stopped.
        beyond: Also measure what heads do at greater distances than this size has, which larger videos have:
            in one forward of as many tokens, more rows and columns and fewer frames; see `profile_larger`.
        report: Called before each run with the number of runs done, that of all runs, and a line of text.
        say: Called with a line of text if the profile can't be kept where it should.

    Raises:
        ValueError: If there are no cases or rows, `path` holds a profile of something else, another
            process is writing it, or a transformer runs in none of the steps.
        OSError: If `path` can't be written; before anything is run.
        PlanError: If the file at `path` is damaged.
    """
    if not cases:
        raise ValueError("profiling needs at least one prompt, got none")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"{option('rows')} must be a whole number >= 1, got {rows!r}")
    if path is not None:
        check_writable(Path(path), option("profile"))
    phases = phases_of(
        cases, reference_steps, beyond=beyond and workload(pipe, settings).has_larger
    )
    profile = started(pipe, settings, rows, phases, path)
    lock = only_writer(path) if path is not None and len(profile.done) < len(phases) else None
    with lock or contextlib.nullcontext():
        if lock:  # another may have gone on in between
            profile = started(pipe, settings, rows, phases, path)
        for number in range(len(profile.done), len(phases)):
            phase, progress = phases[number], None
            if report:
                progress = functools.partial(report, number, len(phases))
                progress(f"{phase.kind}: {phase.case.prompt}")
            run_phase(pipe, profile, phase, progress)
            if path is not None:
                path = _kept(profile, Path(path), say or (lambda text: None))
    if report:
        report(len(phases), len(phases), "profiled")
    return profile


def _kept(profile: Profile, path: Path, say: Callable[[str], None]) -> Path | None:
    """Where the profile is kept from now on; None if that is nowhere, which costs no result."""
    try:
        return rescued(path, functools.partial(write_profile, profile), say)
    except OSError as error:
        say(f"the profile can't be kept ({error.strerror or error}): the search can't be resumed")
        return None


@dataclass(frozen=True)
class Phase:
    """One profiling run.

    Args:
        kind: `"find"` finds candidates, `"beyond"` measures a larger video, `"score"` scores candidates.
        case: The prompt and seed of the run.
        reference_steps: The denoising steps of a run whose video is kept; None for any other run.
    """

    kind: str
    case: Case
    reference_steps: int | None = None

    @property
    def label(self) -> str:
        steps = f" {self.reference_steps} steps" if self.reference_steps else ""
        return f"{self.kind}{steps}|{self.case.seed}|{self.case.prompt}"


def profiling_steps(steps: int) -> int:
    """Denoising steps of profiling runs for generations of so many: a third, at least 4."""
    return max(4, steps // 3)


def phases_of(
    cases: Sequence[Case], reference_steps: int | None = None, *, beyond: bool
) -> list[Phase]:
    """The runs of a profile in order: they find candidates, measure a larger video, and score.

    Args:
        cases: Calibration prompts and seeds; of one alone a second seed is made.
        reference_steps: The steps of the last run, if its video is kept.
        beyond: Whether there is a run of a larger video.
    """
    if len(cases) == 1:
        cases = [cases[0], Case(cases[0].prompt, cases[0].seed + 1)]
    half = len(cases) // 2
    find = [Phase("find", case) for case in cases[:half]]
    score = [Phase("score", case) for case in cases[half:-1]]
    further = [Phase("beyond", cases[0])] if beyond else []
    return [*find, *further, *score, Phase("score", cases[-1], reference_steps)]


def started(
    pipe: Any,
    settings: GenerationSettings,
    rows: int,
    phases: Sequence[Phase],
    path: str | Path | None,
) -> Profile:
    """The profile at `path` if there is one, else an empty one.

    Raises:
        ValueError: If the one at `path` is of something else.
        PlanError: If it is damaged.
    """
    parts = {}
    for name, module in components(pipe).items():
        config: Any = module.config
        parts[name] = ComponentProfile(type(module).__name__, config_hash(config), heads_of(module))
    profile = Profile(parts, settings, rows)
    if path is None or not Path(path).exists():
        return profile
    return _resumed(read_profile(path), profile, [phase.label for phase in phases], path)


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
    for name, part in profile.components.items():
        part.heads = fresh.components[name].heads  # an old file has those of recorded layers alone
    return profile


def run_phase(
    pipe: Any, profile: Profile, phase: Phase, say: Callable[[str], None] | None = None
) -> None:
    """One generation with a recorder on every transformer; the pipeline is then as it was.

    Args:
        pipe: A diffusers pipeline of a supported class, not patched.
        profile: The profile that the run is added to.
        phase: The run: what it measures, and on which case.
        say: Called with a line of text if one can't be made that can be done without.
    """
    if phase.kind == "beyond":
        profile_larger(pipe, profile, phase.case, say)
        profile.done.append(phase.label)
        return
    work, rows, steps = workload(pipe, profile.settings), profile.rows, phase.reference_steps
    if phase.kind == "find" and (plain := work.plain()) != work:
        work, rows = plain, 2 * rows  # as many as both halves of guidance would give
    recorded = None
    if steps is not None:
        recorded = turns(steps, TURNS * work.settings.steps)
        rows = max(1, round(rows * work.settings.steps / len(recorded)))
        work = work.with_steps(steps)
    recorders = {
        name: Recorder(
            part,
            phase.kind,
            rows,
            phase.case.seed,
            turns=recorded,
            projections=projections(components(pipe)[name]),
        )
        for name, part in profile.components.items()
    }
    made = dense_reference(work, phase.case, recorders)
    if idle := [name for name, sigmas in made.forwards.items() if not sigmas]:
        raise ValueError(
            f"every transformer must run while it is profiled, got no forward of {' and '.join(idle)} in "
            f"{work.settings.steps} steps: profile with more, or take out of the pipeline what never runs"
        )
    for recorder in recorders.values():
        recorder.keep()
    profile.seconds += made.seconds
    if steps is not None:
        seconds = sum(recorder.seconds for recorder in recorders.values())
        wall = sum(recorder.wall for recorder in recorders.values())
        alone = Taken(made.taken.seconds - seconds, made.taken.wall - wall)
        profile.reference = replace(made, taken=alone)
        for part in profile.components.values():
            part.drop_unscored()
    profile.done.append(phase.label)
