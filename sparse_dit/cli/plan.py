"""`sparse-dit plan`: a starting plan from a model's geometry, without a search."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..outputs import Outputs
from ..tables import out, show_plan
from .options import Dtype, Force, Frames, Height, Model, Steps, Text, Width, check_size, say


def plan(
    model: Model,
    plan_file: Annotated[Path, typer.Option("--out", help="Plan to write.")] = Path("plan.json"),
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    density: Annotated[
        float, typer.Option(help="Computed pairs / all pairs of a generation, 0 to 1.")
    ] = 0.5,
    steps: Steps = None,
    dense_steps: Annotated[
        float | None,
        typer.Option(help="Share of the steps that run dense; default a quarter, or less."),
    ] = None,
    max_sequence_length: Text = None,
    dtype: Dtype = None,
    from_sta: Annotated[
        Path | None, typer.Option(help="An STA strategy to take windows from; see docs/hosts.md.")
    ] = None,
    force: Force = False,
) -> int:
    """Write a starting plan from geometry alone: uncalibrated, its quality isn't known.

    Text encoders are loaded and run, on the CPU; the transformer's weights aren't.
    """
    from ..inputs import check_model, load_pipeline
    from ..plan.storage import tensor_path

    sizes = {"--height": height, "--width": width, "--num-frames": num_frames, "--steps": steps}
    sizes["--max-sequence-length"] = max_sequence_length
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value}")
    check_size(height, width)
    outputs = Outputs(replace=force, say=say)
    outputs.expect("--out", plan_file, ".json", beside=lambda path: [tensor_path(path)])
    check_model(model)
    from ..search.starting import check_shares, geometric_plan

    if from_sta is not None and (density != 0.5 or dense_steps is not None):
        raise ValueError(
            "--density and --dense-steps don't go with --from-sta, which says them itself"
        )
    check_shares(density, dense_steps, ("--density", "--dense-steps"))
    pipe = load_pipeline(model, "cpu", dtype, weights=False)
    call = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    if from_sta is not None:
        given = {"height": height, "width": width, "num_frames": num_frames}
        given = {name: value for name, value in given.items() if value is not None}
        return _import_sta(pipe, from_sta, given | call, steps, plan_file, outputs, force)
    with _warnings_said():
        made = geometric_plan(
            pipe,
            density=density,
            height=height,
            width=width,
            num_frames=num_frames,
            steps=steps,
            dense_steps=dense_steps,
            call=call,
        )
    lies = outputs.write(plan_file, lambda path: made.save(path, overwrite=force))
    show_plan(made)
    out.print(
        f"wrote {lies}: uncalibrated, its quality isn't known; sparse-dit eval measures it, "
        "sparse-dit search finds a better one",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return outputs.code


def _import_sta(
    pipe: Any,
    strategy: Path,
    given: dict[str, Any],
    steps: int | None,
    plan_file: Path,
    outputs: Outputs,
    force: bool,
) -> int:
    """`plan --from-sta`."""
    from ..hosts.sta import Strategy, import_sta
    from ..integrations import host_of

    found = Strategy.load(strategy)
    if steps not in (None, found.shape[0]):
        raise ValueError(
            f"--steps must be the {found.shape[0]} of the strategy, or left out, got {steps}"
        )
    seen = host_of(pipe).probe(pipe, {**given, "num_inference_steps": found.shape[0]})
    if seen.sigmas is None:
        raise ValueError("this model's schedule doesn't tell the noise levels of its steps")
    made = import_sta(found, pipe, seen.sigmas, seen.layouts)
    lies = outputs.write(plan_file, lambda path: made.save(path, overwrite=force))
    show_plan(made)
    out.print(
        f"wrote {lies}: its quality isn't known", markup=False, highlight=False, soft_wrap=True
    )
    return outputs.code


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextlib.contextmanager
def _warnings_said() -> Iterator[None]:
    """What the package logs is progress for who sits at the terminal."""
    logger, handler = logging.getLogger("sparse_dit"), _Said(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
