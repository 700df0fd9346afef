"""`sparse-dit demo`: search, verify and show a plan for an embedded model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..outputs import Outputs
from .options import Force, resumable, say


class Embedded(str, Enum):
    """A model that ships."""

    WAN = "wan"
    DLM = "dlm"


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("out"),
    model: Annotated[
        Embedded, typer.Option(help="wan makes videos; dlm is a diffusion language model.")
    ] = Embedded.WAN,
    force: Force = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller and sooner, not the demo.")
    ] = False,
) -> int:
    """Search, verify and show a plan for an embedded model; the diffusion language model has a rule."""
    outputs = Outputs(replace=force, say=say)
    if model is Embedded.DLM:
        from ..demo.writing import run_writing_demo

        run_writing_demo(folder, force=force, quick=quick, outputs=outputs)
        return outputs.code
    from ..demo.run import run_demo

    try:
        run_demo(folder, force=force, quick=quick, outputs=outputs)
    except KeyboardInterrupt:
        written = (folder / "plan.json").exists()  # a first one, or of an earlier demo
        resumable(folder / "profile.safetensors", " with --force" if written else "")
        raise
    return outputs.code
