"""What commands do for a diffusion language model."""

from __future__ import annotations

from pathlib import Path

from ..tables import show_denoising_frontier
from .compared import ended, expected, told_apart
from .options import Place, say


def denoising_frontier(
    model: str,
    texts: list[Path],
    tokens: int,
    steps: int | None,
    plans: list[str],
    methods: list[str] | None,
    file: Path,
    plot: Path | None,
    place: Place,
) -> int:
    """Compare plans and rules on texts and pass keys, and write and show the rows."""
    from ..eval.denoising.frontier import DenoisingFrontier, figure_of, frontier
    from ..eval.denoising.ways import METHODS
    from ..eval.denoising.writing import Writing
    from ..inputs import load_denoiser, read_texts
    from ..plan import Plan

    names = told_apart(texts, lambda path: path.name, "--text")
    read = dict(zip(names, read_texts(texts), strict=True))
    if made := [name for name, text in read.items() if not isinstance(text, str)]:
        raise ValueError(f"--text must be a text for a diffusion language model, got {made[0]}")
    loaded = [Plan.from_pretrained(name) for name in plans]
    request = DenoisingFrontier(
        texts={name: text for name, text in read.items() if isinstance(text, str)},
        tokens=tokens,
        writing=Writing() if steps is None else Writing(steps=steps),
        plans=dict(zip(told_apart(plans, lambda path: path.stem, "--plan"), loaded, strict=True)),
        methods=methods or tuple(METHODS),
        file=file,
    )
    outputs, dtype = expected(file, plot), place.dtype or "float32"
    request.check(load_denoiser(model, place.device, dtype, weights=False))
    rows = frontier(load_denoiser(model, place.device, dtype), request, say, outputs)
    show_denoising_frontier(rows)
    return ended(outputs, file, plot, lambda: figure_of(rows))
