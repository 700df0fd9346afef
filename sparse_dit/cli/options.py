"""Options that commands share, and what they say while they work."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..generation import Case, GenerationSettings

err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Folder (or hub id) of a diffusers pipeline.")]
PlanName = Annotated[str, typer.Argument(help="Plan: file, folder, built-in name or hub id.")]
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


@dataclass(frozen=True)
class Cases:
    """The options that say what is generated from: prompts, and the seed of the first of them."""

    prompt: Prompt = None
    prompts: Prompts = None
    seed: Seed = 0

    @property
    def given(self) -> bool:
        """Whether there are prompts."""
        return bool(self.prompt or self.prompts)

    def read(self) -> list[Case]:
        """A case for each prompt; ValueError if there is none."""
        from ..inputs import read_prompts

        return self.numbered(read_prompts(self.prompt or [], self.prompts))

    def numbered(self, texts: list[str] | None, after: int = 0) -> list[Case]:
        """A case for each of these prompts, which come after so many others."""
        from ..generation import Case

        return [Case(text, self.seed + after + i) for i, text in enumerate(texts or [])]


@dataclass(frozen=True)
class Size:
    """The options that say how large what is generated is, and in how many steps."""

    height: Height = None
    width: Width = None
    num_frames: Frames = None
    steps: Steps = None
    guidance: Guidance = None
    max_sequence_length: Text = None

    def settings(self, known: Mapping[str, Any] | None = None) -> GenerationSettings:
        """Settings of the options, filled up with known ones; ValueError if the size isn't known."""
        from ..generation import GenerationSettings

        given = {name: value for name, value in vars(self).items() if value is not None}
        values = {**(known or {}), **given}
        check_size(values.get("height"), values.get("width"))
        return GenerationSettings.from_dict(values)


def check_size(height: int | None, width: int | None) -> None:
    """Raise ValueError unless both are known."""
    sizes = {"--height": height, "--width": width}
    if missing := [name for name, value in sizes.items() if value is None]:
        raise ValueError(f"give {' and '.join(missing)}: the size of what is generated")


@dataclass(frozen=True)
class Place:
    """The options that say where a pipeline runs, and in which dtype."""

    device: Device = "cpu"
    dtype: Dtype = None


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each field of those of its parameters that are dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    flat = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            flat.append(parameter.replace(annotation=hints[name]))
            continue
        kinds = get_type_hints(groups[name], include_extras=True)
        flat += [
            inspect.Parameter(
                field.name, parameter.kind, default=field.default, annotation=kinds[field.name]
            )
            for field in fields(groups[name])
        ]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return command(**given)

    vars(run)["__signature__"] = inspect.Signature(flat)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run


def say(text: str) -> None:
    """Progress, on stderr."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def resumable(profile: Path, how: str = "") -> None:
    """Say after Ctrl-C that what is profiled isn't lost, if there is anything."""
    if profile.exists():
        say(f"the same command{how} goes on from {profile}")
