"""What commands do for a diffusion language model."""

from __future__ import annotations

from pathlib import Path

from ..tables import out, show_denoising_frontier
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
    from ..eval.figures import save_figure
    from ..inputs import load_denoiser, read_texts
    from ..outputs import Outputs
    from ..plan import Plan

    read = dict(zip((path.name for path in texts), read_texts(texts), strict=True))
    request = DenoisingFrontier(
        texts={name: text for name, text in read.items() if isinstance(text, str)},
        tokens=tokens,
        writing=Writing() if steps is None else Writing(steps=steps),
        plans={Path(name).stem: Plan.from_pretrained(name) for name in plans},
        methods=methods or tuple(METHODS),
        file=file,
    )
    outputs = Outputs(replace=True, say=say)
    outputs.expect("--json", file, again=True)
    if plot is not None:
        outputs.expect("--plot", plot, ".png", ".svg")
    rows = frontier(
        load_denoiser(model, place.device, place.dtype or "float32"), request, say, outputs
    )
    show_denoising_frontier(rows)
    if plot is not None:
        figure = figure_of(rows)
        lies = outputs.write(plot, lambda path: save_figure(figure, path))
        out.print(f"wrote {lies}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"wrote {outputs.lies(file)}", markup=False, highlight=False, soft_wrap=True)
    return outputs.code
