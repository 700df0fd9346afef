"""`sparse-dit demo`: search, verify and show a plan for the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..outputs import Outputs
from .options import Force, resumable, say


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("out"),
    force: Force = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller and sooner, not the demo.")
    ] = False,
) -> int:
    """Search, verify and show a plan for the embedded model."""
    from ..demo.run import run_demo

    outputs = Outputs(replace=force, say=say)
    try:
        run_demo(folder, force=force, quick=quick, outputs=outputs)
    except KeyboardInterrupt:
        written = (folder / "plan.json").exists()  # a first one, or of an earlier demo
        resumable(folder / "profile.safetensors", " with --force" if written else "")
        raise
    return outputs.code
