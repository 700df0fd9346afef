"""`sparse-dit plan`: a starting plan from a model's geometry, without a search."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

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

    check_shares(density, dense_steps, ("--density", "--dense-steps"))
    pipe = load_pipeline(model, "cpu", dtype, weights=False)
    call = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
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
