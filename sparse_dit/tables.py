"""What the command line prints: plans and measurements as tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .step_cache import StepCache, compared_rows

if TYPE_CHECKING:
    from pathlib import Path

    from .auto.store import Kept
    from .eval.language.quality import LanguageQuality
    from .eval.report import Report
    from .layout import TokenLayout
    from .models import SupportedModel
    from .patterns import Pattern
    from .plan import ComponentPlan, Plan
    from .search.front import Front, Point

out = Console(width=None if sys.stdout.isatty() else 120)


def show_plan(plan: Plan) -> None:
    """What a plan is for, what it promises, and its stages."""
    out.print(
        f"{plan.pipeline_class or 'transformer'}, density {plan.density:.3f}", highlight=False
    )
    for name in ("forecast", "measured"):
        if values := getattr(plan, name):
            numbers = {key: value for key, value in values.items() if key != "caution"}
            words = ", ".join(f"{key} {value}" for key, value in numbers.items())
            out.print(f"{name}: {words}", markup=False, highlight=False, soft_wrap=True)
    if caution := plan.measured.get("caution"):
        out.print(str(caution), markup=False, highlight=False, soft_wrap=True)
    for name, part in plan.components.items():
        low, high = part.valid_tokens
        out.print(
            f"{name}: {part.model_class}, {len(part.layers)} layers of {_heads(part)} heads, "
            f"made at {part.layout}; sparse from {low} tokens{f' to {high}' if high else ''}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if cache := StepCache.of(plan):
        out.print(f"searched with the step cache {cache}", highlight=False)
    if rows := compared_rows(plan):
        out.print(_compared_table(rows))
    from .plan.evidence import evidence_lines

    for line in evidence_lines(plan):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    out.print(_stage_table(plan))


def _compared_table(rows: list[dict[str, Any]]) -> Table:
    """What a search measured of sparse attention, a step cache, and both."""
    table = Table("way", "step cache", "density", "calls", "PSNR (worst)", "speed-up")
    for row in rows:
        psnr, least = row.get("psnr_db"), row.get("psnr_db_least")
        quality = "-" if psnr is None else f"{psnr:.1f} dB"
        worst = "forecast" if row.get("forecast") else "-" if least is None else f"{least:.1f}"
        table.add_row(
            str(row["what"]), str(row["cache"] or "-"), f"{row['density']:.3f}",
            f"{row['computed']:.0%}", f"{quality} ({worst})", f"{row['speedup']:.2f}x",
        )  # fmt: skip
    return table


def _heads(part: ComponentPlan) -> str:
    """The number of heads of a layer; several if layers differ."""
    return " or ".join(map(str, sorted({num_heads for num_heads, _ in part.heads.values()})))


def show_models(models: Sequence[SupportedModel]) -> None:
    """Models that can be patched, what was tested of each, and those that can't."""
    table = Table("class", "tested with the patch on")
    for model in models:
        table.add_row(model.transformer, model.reason or model.tested)
    out.print(table)


def _stage_table(plan: Plan) -> Table:
    """One row for each component and stage."""
    from .plan import summary_rows

    table = Table(
        "component",
        "progress",
        "branch",
        "steps",
        "heads",
        "density",
        "patterns",
        "error",
        "largest",
    )
    densities = _Densities()
    for row in summary_rows(plan):
        part = plan.components[row["component"]]
        heads = [head for stages in part.layers.values() for head in stages[row["stage"]]]
        density = [densities.of(head.pattern, part.layout) for head in heads]
        patterns = ", ".join(f"{name} {count}" for name, count in row["patterns"].items())
        errors = ["-" if row[k] is None else f"{row[k]:.3f}" for k in ("error", "max_error")]
        table.add_row(
            row["component"], row["progress"], row["branch"], _share_of_steps(plan, row),
            str(row["heads"]), f"{sum(density) / len(density):.3f}" if density else "-", patterns,
            *errors,
        )  # fmt: skip
    return table


def _share_of_steps(plan: Plan, row: dict[str, Any]) -> str:
    """How much of a generation falls into a stage, as the search counted; "-" if it isn't noted."""
    shares = plan.provenance.get("stage_shares")
    listed = shares.get(row["component"]) if isinstance(shares, dict) else None
    if not isinstance(listed, list) or len(listed) != len(plan.components[row["component"]].stages):
        return "-"
    share = listed[row["stage"]]
    return f"{share:.0%}" if isinstance(share, int | float) else "-"


class _Densities:
    """Share of the pairs that patterns compute, each pattern measured once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Pattern, TokenLayout], float] = {}

    def of(self, pattern: Pattern, layout: TokenLayout) -> float:
        from .index import pattern_index
        from .patterns import blockwise
        from .patterns.estimated import density

        key = (pattern, layout)
        if key not in self._known:
            computed = 1.0
            if pattern.is_causal:
                computed = density(pattern.shape, layout.seq_len)
            elif pattern.is_estimated:
                computed = blockwise.density(pattern.shape, layout.num_grid)
            elif not pattern.computed.is_dense:
                computed = pattern_index(*key).density
            self._known[key] = computed / max(
                pattern.every, pattern.settled_every
            )  # over a long stage
        return self._known[key]


def show_heads(plan: Plan) -> None:
    """Every head of every layer and stage: its pattern, and the next best one."""
    from .plan.evidence import prompt_dependent

    table = Table("layer", "stage", "head", "density", "pattern", "error", "runner-up", "its error")
    densities, marked = _Densities(), prompt_dependent(plan)
    for name, part in plan.components.items():
        for layer, stages in part.layers.items():
            place = layer if len(plan.components) == 1 else f"{name}.{layer}"
            for level, (stage, heads) in enumerate(zip(part.stages, stages, strict=True)):
                for number, head in enumerate(heads):
                    mark = "*" if (name, layer, level, number) in marked else ""
                    density = f"{densities.of(head.pattern, part.layout):.3f}"
                    second = "-" if head.runner_up is None else str(head.runner_up)
                    errors = [
                        "-" if error is None else f"{error:.3f}"
                        for error in (head.error, head.runner_up_error)
                    ]
                    table.add_row(
                        place, str(stage), f"{number}{mark}", density, str(head.pattern), errors[0],
                        second, errors[1],
                    )  # fmt: skip
    out.print(table)
    if marked:
        out.print("*: its best places depend on the prompt", highlight=False)


def show_quality(report: Report) -> None:
    """The report's main numbers and findings."""
    from .eval.page import decibels, number, seconds, share, times
    from .eval.sentences import findings

    quality = report.quality
    table = Table(
        "dense", "sparse", "speed-up", "density", "PSNR", "flat image", "noise floor", "SSIM",
        "search",
    )  # fmt: skip
    table.add_row(
        seconds(quality.dense_seconds), seconds(quality.sparse_seconds), times(quality.speedup),
        share(quality.density), decibels(quality.psnr_db), decibels(quality.psnr_flat_db),
        decibels(quality.psnr_noise_floor_db), number(quality.ssim), _search_time(report),
    )  # fmt: skip
    out.print(table)
    for sentence in findings(report):
        out.print(sentence, markup=False, highlight=False, soft_wrap=True)


def show_language_quality(quality: LanguageQuality) -> None:
    """Texts, then questions: dense beside sparse."""
    from .eval.language.report import task_rows
    from .eval.page import seconds, share, times

    texts = Table(
        "text", "dense", "sparse", "speed-up", "density", "perplexity", "sparse", "KL", "floor",
        "agreement",
    )  # fmt: skip
    for text in quality.texts:
        texts.add_row(
            text.name, seconds(text.dense.seconds), seconds(text.sparse.seconds),
            times(text.dense.seconds / text.sparse.seconds), share(text.density),
            f"{text.dense_perplexity:.3f}", f"{text.sparse_perplexity:.3f}", f"{text.kl:.4f}",
            f"{text.kl_floor:.6f}", share(text.agreement),
        )  # fmt: skip
    out.print(texts)
    if not quality.questions:
        return
    asked = Table("questions", "tokens", "found", "sparse", "log-probability", "sparse", "floor")
    for row in task_rows(quality):
        asked.add_row(
            f"{row.count} {row.kind}", str(row.tokens), share(row.dense_found),
            share(row.sparse_found), f"{row.dense_log_prob:.2f}", f"{row.sparse_log_prob:.2f}",
            f"{row.floor:.2f}",
        )  # fmt: skip
    out.print(asked)


def _search_time(report: Report) -> str:
    generations = report.search_dense_generations
    return "-" if generations is None else f"{generations:.1f} dense runs"


def show_frontier(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of a frontier as a table, best PSNR first at each wanted density."""
    table = Table("wanted", "method", "density", "PSNR (worst)", "SSIM", "speed-up")
    order = sorted(rows, key=lambda row: (row["target"], -row.get("psnr_db", -1.0)))
    for row in order:
        if "psnr_db" not in row:
            table.add_row(f"{row['target']:g}", row["method"], row["none"], "", "", "")
            continue
        quality = f"{row['psnr_db']:.1f} dB ({row['psnr_min_db']:.1f})"
        ssim = "-" if row["ssim"] is None else f"{row['ssim']:.3f}"
        table.add_row(
            f"{row['target']:g}", row["method"], f"{row['density']:.3f}", quality, ssim,
            f"{row['speedup']:.2f}x",
        )  # fmt: skip
    out.print(table)
    if measured := [row for row in rows if "psnr_db" in row]:
        flat, floor = measured[0]["psnr_flat_db"], measured[0]["psnr_noise_floor_db"]
        text = "" if floor is None else f", noise floor {floor:.0f} dB"
        out.print(
            f"{measured[0]['tokens']:,} tokens; flat image {flat:.1f} dB{text}", highlight=False
        )


def show_language_frontier(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of a language model's frontier, least divergence first at each target."""
    table = Table(
        "at", "method", "density", "speed-up", "index", "perplexity", "KL", "agreement", "passkeys"
    )  # fmt: skip
    for row in sorted(rows, key=lambda row: (str(row["target"]), row["kl"])):
        at = row["target"]
        at = f"time of {at}" if isinstance(at, str) else f"{at:g}"
        table.add_row(
            at, row["method"], f"{row['density']:.3f}", f"{row['speedup']:.2f}x",
            f"{row['index_seconds']:.2f} s", f"{row['perplexity_increase']:+.1%}",
            f"{row['kl']:.4f}", f"{row['agreement']:.1%}" if "agreement" in row else "-",
            f"{row['passkeys']}/{row['asked']}",
        )  # fmt: skip
    out.print(table)
    if rows:
        first = rows[0]
        out.print(
            f"dense: {first['dense_seconds']:.2f} s, {first['dense_passkeys']} passkeys; by another kernel "
            f"KL {first['kl_floor']:.6f}",
            highlight=False,
        )


def show_denoising_frontier(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of a diffusion language model's frontier, least divergence first."""
    table = Table(
        "method", "number", "density", "speed-up", "of a step", "KL", "agreement", "pass keys", "kept",
        "making",
    )  # fmt: skip
    for row in sorted(rows, key=lambda row: row["kl"]):
        table.add_row(
            row["method"], "-" if row["number"] is None else f"{row['number']:g}",
            f"{row['density']:.3f}", f"{row['speedup']:.2f}x", f"{row['step_speedup']:.2f}x",
            f"{row['kl']:.4f}", f"{row['agreement']:.1%}", f"{row['passkeys']}/{row['asked']}",
            f"{row['kept']:.2%}", "-" if row.get("making") is None else f"{row['making']:.2%}",
        )  # fmt: skip
    out.print(table)
    if rows:
        first = rows[0]
        said = f"dense: {first['dense_seconds']:.2f} s, {first['dense_passkeys']} pass keys"
        out.print(said, highlight=False)


def show_kept(kept: Sequence[Kept], folder: Path) -> None:
    """Plans that were learned, and where they lie."""
    table = Table("name", "for", "density", "forecast speed-up", "learned from", "on")
    for one in kept:
        speed, record = one.plan.forecast.get("speedup"), one.plan.provenance
        table.add_row(
            one.name, one.plan.pipeline_class or "transformer", f"{one.plan.density:.3f}",
            "-" if speed is None else f"{speed:.2f}x", f"{record.get('learned_from', '-')} generations",
            str(record.get("created", "-")),
        )  # fmt: skip
    if kept:
        out.print(table)
    out.print(f"{len(kept)} plans in {folder}", markup=False, highlight=False, soft_wrap=True)


def show_front(front: Front) -> None:
    """Points of a search, from dense to the fastest."""
    of_text = any(point.kl is not None for point in front.points)
    quality = "KL" if of_text else "PSNR"
    table = Table("forecast speed-up", "density", "error of heads", quality, "seconds")
    for point in front.points:
        table.add_row(
            f"{point.speedup:.2f}x",
            f"{point.density:.3f}",
            f"{point.error:.4f}",
            _quality(point),
            f"{point.seconds:.2f}",
        )
    out.print(table)


def _quality(point: Point) -> str:
    """The forecast of what is compared with dense, or a dash."""
    if point.kl is not None:
        return f"{point.kl:.4f}"
    return "-" if point.psnr is None else f"{point.psnr:.1f} dB"
