"""What commands that compare methods and plans are given, and what they write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..outputs import Outputs
from ..tables import out
from .options import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def told_apart(names: Sequence[str | Path], short: Callable[[Path], str], what: str) -> list[str]:
    """What rows call each of these: its short name, or all as they are given where two would be one.

    Args:
        names: Files, or what else a plan goes by.
        short: The short name of a path.
        what: The option.

    Raises:
        ValueError: If one is given twice.
    """
    whole, found = [*map(str, names)], [short(Path(name)) for name in names]
    if twice := next((name for name in whole if whole.count(name) > 1), None):
        raise ValueError(f"{what} must name each once, got {twice} twice")
    return found if len({*found}) == len(found) else whole


def expected(file: Path, plot: Path | None) -> Outputs:
    """What a comparison writes: its rows, which it goes on with, and a picture."""
    outputs = Outputs(replace=True, say=say)
    outputs.expect("--json", file, again=True)
    if plot is not None:
        outputs.expect("--plot", plot, ".png", ".svg")
    return outputs


def ended(outputs: Outputs, file: Path, plot: Path | None, drawn: Callable[[], Figure]) -> int:
    """Draw the picture that was asked for, say where all lies, and return the exit code."""
    from ..eval.figures import save_figure

    if plot is not None:
        figure = drawn()
        lies = outputs.write(plot, lambda path: save_figure(figure, path))
        out.print(f"wrote {lies}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"wrote {outputs.lies(file)}", markup=False, highlight=False, soft_wrap=True)
    return outputs.code
