"""Quality over density: our plans and the published methods' best, on the same held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..environment import environment
from ..generation import Case, GenerationSettings
from ..integrations import components, workload
from ..on_cpu import on_cpu
from ..online import RULES
from ..outputs import Outputs, check_writable
from ..plan import Plan
from ..search.engine import Searched, search_plan
from ..words import option
from .baselines import (
    METHODS,
    SOURCES,
    BaselineScores,
    least_loss_at_density,
    plan_at,
    rule_plan_at,
    score_baselines,
)
from .quality import Quality, evaluate, forecast_speedup
from .rows import keep_rows, kept_rows, model_told, weights_told

Say = Callable[[str], None]
FORMAT = "sparse_dit frontier 1"
DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
TRANSFERRED = "searched at another size"
ALL_METHODS = (*METHODS, *RULES)


@dataclass(frozen=True)
class FrontierRequest:
    """What to compare.

    Args:
        calibration, held_out: Cases to search on, and to measure on.
        settings: Size, steps, guidance.
        densities: Shares of the pairs, each in (0, 1).
        methods: Some of `ALL_METHODS`: searched, baselines that are plans, rules without a plan.
        file: JSON of the rows; one that is there is gone on with.
        searched_at: Another size to search at too; its plans, used unchanged, are the method `TRANSFERRED`.

    Raises:
        ValueError: If anything is out of range.
    """

    calibration: Sequence[Case]
    held_out: Sequence[Case]
    settings: GenerationSettings
    densities: Sequence[float]
    methods: Sequence[str]
    file: Path
    searched_at: GenerationSettings | None = None

    def __post_init__(self) -> None:
        if not self.densities or not all(0 < d < 1 for d in self.densities):
            raise ValueError(
                f"{option('densities')} must lie between 0 and 1, got {list(self.densities)}"
            )
        if unknown := set(self.methods) - set(ALL_METHODS):
            raise ValueError(
                f"{option('methods')} must be among {list(ALL_METHODS)}, got {sorted(unknown)}"
            )
        if not self.held_out:
            raise ValueError(
                f"measuring needs a held-out prompt, got none; give {option('held_out')}"
            )
        if self.searched_at == self.settings:
            raise ValueError("the other size to search at must be another one, got the same")
        if shared := {c.prompt for c in self.calibration} & {c.prompt for c in self.held_out}:
            raise ValueError(
                f"held-out prompts must not be calibration prompts: {sorted(shared)[:3]}"
            )

    @property
    def all_methods(self) -> tuple[str, ...]:
        """All methods that are measured: `methods`, and `TRANSFERRED` if another size is searched at."""
        return (*self.methods, *([TRANSFERRED] if self.searched_at else []))

    def conditions(self, pipe: Any) -> dict[str, Any]:
        """What rows of one file have in common."""
        other = {"elsewhere": self.searched_at.to_dict()} if self.searched_at else {}
        return {
            **other,
            "model": model_told(pipe),
            "weights": weights_told(pipe),
            "settings": self.settings.to_dict(),
            "calibration": [[c.prompt, c.seed] for c in self.calibration],
            "held_out": [[c.prompt, c.seed] for c in self.held_out],
        }


@on_cpu
def frontier(
    pipe: Any, request: FrontierRequest, say: Say, outputs: Outputs | None = None
) -> list[dict[str, Any]]:
    """Measure every method at every density; rows are in the file as soon as they are measured.

    Each row: method, source, target, density, tokens, psnr_db, psnr_min_db, ssim, speedup, why that says
    little (`caution`, or None), seconds, dense_seconds, and the speed-up that the search forecast (None for
    plans of others and of another size); a method without a plan at a density has a row with `"none"`. Dense
    generations are made anew for each density, so that speed-ups bear a machine whose speed drifts over the
    hour.

    Args:
        pipe: A diffusers pipeline with one transformer, not patched.
        request: What to compare.
        say: Called with a line of text before each step.
        outputs: Knows afterwards where the file lies, if it couldn't be written where it should.

    Raises:
        ValueError, NotImplementedError, OSError: See `started`.
    """
    outputs = outputs or Outputs(replace=True, say=say)
    rows = started(pipe, request)
    wanted = [(d, m) for d in request.densities for m in request.all_methods]
    done = {(row["target"], row["method"]) for row in rows}
    todo = [pair for pair in wanted if pair not in done]
    if not todo:
        return rows
    plans = _Plans.of(pipe, request, {method for _, method in todo}, say)
    conditions, provenance = request.conditions(pipe), environment(getattr(pipe, "device", "cpu"))
    before: Quality | None = None
    timed_for: float | None = None  # the density that its dense generations were made for
    for number, (target, method) in enumerate(todo, 1):
        say(f"{number}/{len(todo)}: {method} at density {target:g}")
        plan = plans.at(method, target)
        row = {"method": method, "source": plans.source(method), "target": target}
        if plan is None:
            rows.append({**row, "none": "no plan of this method is so sparse"})
        else:
            before = evaluate(
                pipe,
                plan,
                request.held_out,
                request.settings,
                references=before.references if before and timed_for == target else None,
                noise_cases=0 if before else 1,
                warm_up=before is None,
            )
            timed_for = target
            forecast = None if method == TRANSFERRED else forecast_speedup(plan)
            rows.append({**row, **_measured(before), "forecast": forecast})
        keep_rows(outputs, request.file, FORMAT, conditions, provenance, rows)
    return rows


def started(pipe: Any, request: FrontierRequest) -> list[dict[str, Any]]:
    """The rows that are in the file already.

    Args:
        pipe: A loaded pipeline, or an `outline` of one.
        request: What to compare.

    Raises:
        ValueError: If the file holds rows of other conditions, or the pipeline can't make the size.
        NotImplementedError: For a pipeline with several transformers.
        OSError: If the file can't be written.
    """
    if len(found := components(pipe)) > 1:
        raise NotImplementedError(
            f"baselines are scored for one transformer, got {' and '.join(found)}; search such a pipeline "
            "with `sparse-dit search` and measure its plan with `sparse-dit eval`"
        )
    for settings in filter(None, (request.settings, request.searched_at)):
        workload(pipe, settings).check(request.held_out[0])
    check_writable(request.file, "file")
    return kept_rows(request.file, FORMAT, request.conditions(pipe))


@dataclass(frozen=True, eq=False)
class _Plans:
    """Every method's plans at a size.

    Args:
        pipe, request: As of `frontier`.
        searched: The result of a search at that size; None if only rules without a plan are measured.
        scores: The errors and densities of the baselines' patterns; None likewise.
        transferred: The result of a search at another size, for the method `TRANSFERRED`; None without it.
    """

    pipe: Any
    request: FrontierRequest
    searched: Searched | None
    scores: BaselineScores | None
    transferred: Searched | None

    @staticmethod
    def of(pipe: Any, request: FrontierRequest, methods: set[str], say: Say) -> _Plans:
        """Search, and score the baselines' patterns."""
        if methods <= set(RULES):
            return _Plans(pipe, request, None, None, None)
        searched = _searched(pipe, request, request.settings, "profile", say)
        ((component, part),) = searched.profile.components.items()
        transferred = None
        if request.searched_at and TRANSFERRED in methods:
            say("searching at the other size")
            transferred = _searched(pipe, request, request.searched_at, "elsewhere", say)
        say("scoring the baselines' patterns")
        scores = score_baselines(pipe, component, part, request.calibration[-1], request.settings)
        return _Plans(pipe, request, searched, scores, transferred)

    def at(self, method: str, target: float) -> Plan | None:
        """A method's plan at a density; None if it has none there."""
        request = self.request
        if method in RULES:
            case = request.calibration[-1]
            return rule_plan_at(self.pipe, method, target, case, request.settings)
        assert self.searched is not None and self.scores is not None, "plans are searched"
        if method == TRANSFERRED:
            assert self.transferred is not None, "it was asked for"
            ((_, part),) = self.searched.profile.components.items()
            return least_loss_at_density(self.transferred, target, part.known_layout)
        return plan_at(method, self.searched, self.scores, target)

    def source(self, method: str) -> str:
        """What a method is, in words."""
        if method in RULES:
            return RULES[method].source
        if method != TRANSFERRED:
            return SOURCES[method]
        assert self.transferred is not None, "it was asked for"
        ((_, part),) = self.transferred.profile.components.items()
        return f"ours, searched at {part.known_layout}, used unchanged"


def _searched(
    pipe: Any, request: FrontierRequest, settings: GenerationSettings, suffix: str, say: Say
) -> Searched:
    """A search whose profile lies beside the rows."""
    return search_plan(
        pipe,
        request.calibration,
        settings=settings,
        max_error=0.5,
        tune_on="calibration",
        profile=request.file.with_suffix(f".{suffix}.safetensors"),
        report=say,
    )


def _measured(quality: Quality) -> dict[str, Any]:
    return {
        "density": round(quality.density, 5),
        "tokens": quality.tokens,
        "psnr_db": round(quality.psnr_db, 3),
        "psnr_min_db": round(quality.psnr_min_db, 3),
        "ssim": None if quality.ssim is None else round(quality.ssim, 4),
        "speedup": round(quality.speedup, 4),
        "caution": quality.caution,
        "seconds": round(quality.sparse_seconds, 3),
        "dense_seconds": round(quality.dense_seconds, 3),
        "psnr_flat_db": round(quality.psnr_flat_db, 3),
        "psnr_noise_floor_db": quality.psnr_noise_floor_db,
    }


def figure_of(rows: Sequence[dict[str, Any]]) -> Figure:
    """PSNR over density, a line for each method; the flat image's PSNR beside it."""
    measured = [row for row in rows if "psnr_db" in row]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(row["method"] for row in measured)):
        points = sorted((r["density"], r["psnr_db"]) for r in measured if r["method"] == method)
        width = 2.5 if method == "searched" else 1.2
        axes.plot(
            *zip(*points, strict=True), marker="osD^vPX*"[number % 8], linewidth=width, label=method
        )
    if measured:
        axes.axhline(measured[0]["psnr_flat_db"], color="black", linestyle=":", label="flat image")
        axes.legend(frameon=False, fontsize=8)
        axes.set_title(f"{measured[0]['tokens']:,} tokens, held-out prompts", fontsize=9)
    axes.set_xlabel("density (computed pairs / all pairs)")
    axes.set_ylabel("PSNR against dense, dB")
    axes.grid(alpha=0.2)
    return figure
