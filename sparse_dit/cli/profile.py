"""`sparse-dit profile`: profile a model in several processes, or under torchrun."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..outputs import MOVED, Outputs
from .options import Cases, Model, Place, ProfileSteps, Size, say, with_options

if TYPE_CHECKING:
    from ..generation import Case, GenerationSettings

PATIENCE = timedelta(days=7)  # processes wait for one another's generations


@dataclass(frozen=True)
class _Job:
    """What every process is told."""

    model: str
    device: str
    dtype: str | None
    cases: list[Case]
    settings: GenerationSettings
    rows: int
    path: Path


@with_options
def profile(
    model: Model,
    *,
    file: Annotated[Path, typer.Option("--out", help="Profile to write, or to go on with.")] = Path(
        "profile.safetensors"
    ),
    cases: Cases,
    size: Size,
    rows: Annotated[int, typer.Option(min=1, help="Sampled query rows of each call.")] = 64,
    profile_steps: ProfileSteps = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    place: Place,
) -> int:
    """Profile a model's heads for later searches, over the prompts in parallel.

    Under torchrun each process takes its share of the prompts. Search with the same options, all of the
    prompts, other prompts as --held-out, and --profile. Steps are those of the generation: a third of them
    is run, at least 4, unless --profile-steps says how many.
    """
    from ..search.asked import profiled_at
    from ..search.profile_file import only_writer

    given = cases.read()
    settings = profiled_at(size.settings(), profile_steps)
    job = _Job(model, place.device, place.dtype, given, settings, rows, file)
    torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if torchrun and workers != 1:
        raise ValueError("under torchrun its processes are the workers; leave out --workers")
    _check(job)
    if torchrun:
        rank = int(os.environ["RANK"])
        with only_writer(file, rank == 0):
            lies = _joined(rank, int(os.environ["WORLD_SIZE"]), "env://", job)
        if rank:
            return 0
    else:
        with only_writer(file):
            lies = _spawned(workers, job)
    say(f"wrote {lies}")
    return 0 if lies == file else MOVED


def _check(job: _Job) -> None:
    """Raise, before a model is loaded, if it can't be profiled so or the file couldn't be written."""
    from ..inputs import described
    from ..search.asked import check_profile, check_search

    outputs = Outputs(replace=True, say=say)
    outputs.expect("--out", job.path, again=True)
    if (pipe := described(job.model, job.device, job.dtype)) is not None:
        check_search(pipe, job.cases[0], job.settings, rows=job.rows)
        check_profile(pipe, job.cases, job.settings, job.path, rows=job.rows)


def _spawned(workers: int, job: _Job) -> Path:
    """Run the job in so many new processes; the first error that one of them meets, in one line.

    Where the profile lies is returned.
    """
    if workers == 1:
        return _share(0, 1, lambda: None, job)
    from torch.multiprocessing.spawn import ProcessRaisedException, spawn

    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        try:
            spawn(_started, (workers, meeting, job, Path(folder, "lies")), nprocs=workers)
        except ProcessRaisedException as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"process {error.error_index + 1} failed: {reason}") from error
        return Path(Path(folder, "lies").read_text(encoding="utf-8"))


def _started(rank: int, world: int, meeting: str, job: _Job, note: Path) -> None:
    """A spawned process: its share of the threads, then the job; the first notes where the profile lies."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    lies = _joined(rank, world, meeting, job)
    if rank == 0:
        note.write_text(str(lies), encoding="utf-8")


def _joined(rank: int, world: int, meeting: str, job: _Job) -> Path:
    """Join the other processes and do this one's share; where the profile lies is returned."""
    from torch import distributed

    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world, timeout=PATIENCE
    )
    try:
        return _share(rank, world, distributed.barrier, job)
    finally:
        distributed.destroy_process_group()


def _share(rank: int, world: int, barrier: Callable[[], object], job: _Job) -> Path:
    from ..inputs import load_pipeline
    from ..search.shares import profile_share

    device = _device(job.device, int(os.environ.get("LOCAL_RANK", rank)))
    return profile_share(
        load_pipeline(job.model, device, job.dtype),
        job.cases,
        job.settings,
        job.path,
        rank=rank,
        world=world,
        barrier=barrier,
        rows=job.rows,
        report=say,
    )


def _device(name: str, rank: int) -> str:
    """Processes on "cuda" take one GPU each, in turn."""
    if name != "cuda":
        return name
    import torch

    return f"cuda:{rank % torch.cuda.device_count()}"
