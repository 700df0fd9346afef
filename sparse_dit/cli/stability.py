"""`sparse-dit stability`: how much a plan depends on the prompts that it is calibrated with."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from ..outputs import Outputs
from ..tables import out
from .options import Cases, Model, Place, Size, say, with_options

if TYPE_CHECKING:
    from ..eval.stability_file import RepeatRow, StabilityRow
    from ..generation import Case

DRAWN = 2  # held-out prompts, if none are given


@with_options
def stability(
    model: Model,
    *,
    file: Annotated[
        Path, typer.Option("--json", help="Result; goes on with one that is there.")
    ] = Path("stability.json"),
    cases: Cases,
    held_out: Annotated[
        list[str] | None, typer.Option(help="A prompt to judge on; repeatable.")
    ] = None,
    count: Annotated[
        list[int] | None, typer.Option(min=1, help="Calibration prompts; repeatable: 1, 2, 4.")
    ] = None,
    density: Annotated[float, typer.Option(help="Of every plan.")] = 0.3,
    rows: Annotated[int, typer.Option(min=1, help="Sampled query rows of each call.")] = 64,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also generate the held-out prompts with each plan.")
    ] = False,
    repeat: Annotated[
        int, typer.Option(min=0, help="Also search so often with the same settings: 3.")
    ] = 0,
    size: Size,
    place: Place,
) -> int:
    """Plans from 1, 2 and 4 prompts: how many heads keep their choice, and what it costs held-out.

    With --repeat: how far searches of the same settings are apart.

    Prompts that are left out are drawn from those of the embedded model.
    """
    from ..eval.stability import stability as compare
    from ..eval.stability import started
    from ..eval.stability_file import COUNTS, StabilityRequest
    from ..inputs import check_model, described, load_pipeline
    from ..search.profiling import profiling_steps

    counts = sorted(set(count)) if count else list(COUNTS)
    check_model(model)
    settings = size.settings()
    calibration, judged = _cases(cases, held_out or [], counts[-1])
    request = StabilityRequest(
        calibration,
        judged,
        settings,
        file,
        counts,
        density,
        profile_steps=profiling_steps(settings.steps),
        rows=rows,
        generate=generate,
        repeats=repeat,
    )
    outputs = Outputs(replace=True, say=say)
    outputs.expect("--json", file, again=True)
    if (pipe := described(model, place.device, place.dtype)) is not None:
        started(pipe, request)
    found = compare(load_pipeline(model, place.device, place.dtype), request, say, outputs)
    _show(found.rows, density)
    _show_repeats(found.repeats)
    out.print(f"wrote {outputs.lies(file)}", markup=False, highlight=False, soft_wrap=True)
    return outputs.code


def _cases(cases: Cases, held_out: list[str], count: int) -> tuple[list[Case], list[Case]]:
    """Calibration and held-out cases: the first ones given, and the others if none are named."""
    from ..eval.draw import all_prompts

    if cases.given:
        texts = [case.prompt for case in cases.read()]
        later = held_out or texts[count:]
    else:
        known = all_prompts()
        if count + DRAWN > len(known):
            raise ValueError(
                f"--count must be at most {len(known) - DRAWN} unless prompts are given, got {count}; give "
                "--prompts FILE"
            )
        texts = Random(cases.seed).sample(known, count + DRAWN)
        later = held_out or texts[count:]
        say("prompts are drawn from the embedded model's vocabulary")
    return cases.numbered(texts[:count]), cases.numbered(later, after=count)


def _show(rows: list[StabilityRow], density: float) -> None:
    from rich.table import Table

    from ..eval.page import decibels

    table = Table(
        "prompts", "same pattern", "same kind", "near density", "error expected", "held out",
        "video error", "PSNR", "worst",
    )  # fmt: skip
    for row in rows:
        shares = [f"{s:.0%}" for s in (row.same_pattern, row.same_kind, row.near_density)]
        errors = [f"{row.expected_error:.4f}", f"{row.held_out_error:.4f}", f"{row.loss:.2f}x"]
        psnr = decibels(row.psnr_db), decibels(row.psnr_least_db)
        table.add_row(str(row.prompts), *shares, *errors, *psnr)
    out.print(table)
    out.print(
        f"Heads that choose as with {rows[-1].prompts} prompts, all plans at density {density:g}; video "
        "error is the expected one of held-out videos, relative to that plan's.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _show_repeats(rows: list[RepeatRow]) -> None:
    from rich.table import Table

    from ..eval.page import decibels
    from ..eval.repeats import spread_of

    if not rows:
        return
    table = Table("search", "same pattern", "density", "error expected", "PSNR", "worst")
    for number, row in enumerate(rows, 1):
        found = row.psnr or []
        mean = sum(found) / len(found) if found else None
        table.add_row(
            str(number), f"{row.same_pattern:.0%}", f"{row.density:.4f}", f"{row.expected_error:.4f}",
            decibels(mean), decibels(min(found, default=None)),
        )  # fmt: skip
    out.print(table)
    if (spread := spread_of(rows)) is not None:
        one, mean, least, most = spread
        out.print(
            f"{len(rows)} searches of the same settings: PSNR differs by at most {one:.2f} dB on a prompt, "
            f"by {mean:.2f} dB in the mean; over prompts it goes from {least:.1f} to {most:.1f} dB.",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
