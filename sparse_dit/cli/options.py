"""Options that commands share, and what they say while they work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..generation import GenerationSettings

err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Folder (or hub id) of a diffusers pipeline.")]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; repeatable.")]
Prompts = Annotated[Path | None, typer.Option(help="File of prompts, one a line.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Frames = Annotated[int | None, typer.Option(help="Frames of video.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
Text = Annotated[int | None, typer.Option(help="Text tokens; the pipeline's own if left out.")]
ProfileSteps = Annotated[
    int | None,
    typer.Option(min=1, help="Of profiling runs: the noise levels told apart; default a third."),
]
Seed = Annotated[int, typer.Option(help="Of the first prompt; the next ones count up.")]


def say(text: str) -> None:
    """Progress, on stderr."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def resumable(profile: Path, how: str = "") -> None:
    """Say after Ctrl-C that what is profiled isn't lost, if there is anything."""
    if profile.exists():
        say(f"the same command{how} goes on from {profile}")


def settings_of(known: dict[str, Any], *given: Any) -> GenerationSettings:
    """Settings of the options, filled up with known ones; ValueError if the size isn't known."""
    from ..generation import GenerationSettings

    names = ("height", "width", "num_frames", "steps", "guidance", "max_sequence_length")
    values = {name: v for name, v in zip(names, given, strict=True) if v is not None}
    values = {**known, **values}
    if missing := [f"--{name}" for name in ("height", "width") if name not in values]:
        raise ValueError(f"give {' and '.join(missing)}: the size of what is generated")
    return GenerationSettings.from_dict(values)
