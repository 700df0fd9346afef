"""What a plan costs in likeness and saves in seconds, measured on whole generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..fastest import STOCK
from ..generation import Case, GenerationSettings
from ..integrations import Workload, attached, components, unpatched, workload
from ..layout import TokenLayout
from ..on_cpu import on_cpu
from ..patch import patch
from ..plan import Plan
from ..search.verify import stock
from ..summary import Summary
from ..timing import Pairs, Taken
from .metrics import METRICS, drift, flat_psnr, mean_db, nonfinite, psnr
from .runs import Recorded, noise_floor_video, record

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CaseQuality:
    """One prompt and seed, sparse against dense.

    Attributes:
        case: Prompt and seed.
        dense_seconds, sparse_seconds: What the whole pipeline call takes; see `Taken.seconds`.
        dense_wall, sparse_wall: What it takes by the clock, in seconds.
        psnr_db: Sparse against dense; inf if equal, NaN if either has one.
        psnr_flat_db: The dense video against its own mean colour.
        psnr_noise_floor_db: Dense against dense (`NOISE_FLOOR`); None if not measured for this case.
        metrics: What each of `METRICS` says; None where a video is too small for it.
        drift: Relative distance of the latents after each step.
        nonfinite_dense, nonfinite_sparse: NaN and infinite values in the videos.
    """

    case: Case
    dense_seconds: float
    sparse_seconds: float
    dense_wall: float
    sparse_wall: float
    psnr_db: float
    psnr_flat_db: float
    psnr_noise_floor_db: float | None
    metrics: dict[str, float | None]
    drift: list[float]
    nonfinite_dense: int
    nonfinite_sparse: int


@dataclass(frozen=True)
class Quality:
    """A plan's measured quality and speed over some cases.

    Attributes:
        settings: How the videos were generated.
        tokens: Length of the attention's sequence.
        density: Computed pairs over all pairs, over the whole generation.
        forecast_speedup: What the plan promised; None if it promises nothing.
        cases: One for each prompt and seed.
        interleaved: Whether dense and sparse runs took turns; if not, dense times are older.
        summary: What ran where, as text.
        references: The dense generations, to compare other plans with.
        sparse_videos: `[T, H, W, 3]`, one for each case.
        sparse_calls, dense_calls: Attention calls of one generation with the plan.
        layout: Where the tokens lie; None if it wasn't noted.
    """

    settings: GenerationSettings
    tokens: int
    density: float
    forecast_speedup: float | None
    cases: list[CaseQuality]
    interleaved: bool
    summary: str
    sparse_calls: int
    dense_calls: int
    references: list[Recorded] = field(repr=False)
    sparse_videos: list[np.ndarray] = field(repr=False)
    layout: TokenLayout | None = None

    @property
    def dense_seconds(self) -> float:
        """Mean over cases."""
        return float(np.mean([case.dense_seconds for case in self.cases]))

    @property
    def sparse_seconds(self) -> float:
        """Mean over cases."""
        return float(np.mean([case.sparse_seconds for case in self.cases]))

    @property
    def speedup(self) -> float:
        """Dense over sparse seconds, whole pipeline calls; 1 if no attention call ran sparse."""
        return self.pairs.speedup if self.pairs else 1.0

    @property
    def pairs(self) -> Pairs | None:
        """How long each case took; None if no attention call ran sparse: nothing is compared then."""
        if not self.sparse_calls:
            return None
        return Pairs(
            [Taken(case.dense_seconds, case.dense_wall) for case in self.cases],
            [Taken(case.sparse_seconds, case.sparse_wall) for case in self.cases],
        )

    @property
    def caution(self) -> str | None:
        """Why the speed-up says little, if it does."""
        return self.pairs.caution if self.pairs else None

    @property
    def psnr_db(self) -> float:
        """Mean over cases, see `mean_db`."""
        return mean_db(case.psnr_db for case in self.cases)

    @property
    def psnr_min_db(self) -> float:
        """The worst case; NaN if any is."""
        return float(np.min([case.psnr_db for case in self.cases]))

    @property
    def psnr_flat_db(self) -> float:
        """Mean over cases."""
        return mean_db(case.psnr_flat_db for case in self.cases)

    @property
    def psnr_noise_floor_db(self) -> float | None:
        """Mean over the cases it was measured for; None if for none."""
        values = [c.psnr_noise_floor_db for c in self.cases if c.psnr_noise_floor_db is not None]
        return mean_db(values) if values else None

    @property
    def metrics(self) -> dict[str, float | None]:
        """Mean over cases of each metric; None if frames are too small for it."""
        names = self.cases[0].metrics
        values = {name: [case.metrics[name] for case in self.cases] for name in names}
        return {
            name: None if None in found else float(np.mean(np.array(found, float)))
            for name, found in values.items()
        }

    @property
    def ssim(self) -> float | None:
        """Mean over cases; None if frames are too small."""
        return self.metrics["ssim"]

    @property
    def drift(self) -> list[float]:
        """Mean over cases, after each step."""
        return np.mean([case.drift for case in self.cases], axis=0).tolist()

    @property
    def nonfinite(self) -> int:
        """NaN and infinite values in all sparse videos."""
        return sum(case.nonfinite_sparse for case in self.cases)


@on_cpu
def evaluate(
    pipe: Any,
    plan: Plan,
    cases: Sequence[Case],
    settings: GenerationSettings,
    *,
    references: Sequence[Recorded] | None = None,
    noise_cases: int = 1,
    warm_up: bool = True,
    backend: str = "auto",
    dense: str = STOCK,
    progress: Progress | None = None,
) -> Quality:
    """Generate every case dense and sparse and compare.

    Dense and sparse runs of a case follow each other, and which comes first alternates, so that a
    slow minute of the machine hits both.

    Args:
        pipe: A stock diffusers pipeline; stock again on return, after an error too.
        plan: What to measure.
        cases: Prompts and seeds.
        settings: Size, steps, guidance.
        references: Dense results of the same cases and settings; saves generating them again.
        noise_cases: For how many cases the dense-versus-dense floor is measured (one more dense
            generation each).
        warm_up: Run two steps of both first, so that first-use costs don't count.
        backend: The backend of sparse attention, as `patch` takes it.
        dense: Who computes the plan's dense calls, as `patch` takes it. What is compared with is stock.
        progress: Called with a line of text before each generation.

    Raises:
        ValueError: If there are no cases, the references are of other cases, or the pipeline is patched.
    """
    cases = list(cases)
    _check(pipe, cases, references)
    say = progress or (lambda text: None)
    work = workload(pipe, settings)
    layout = _layout(work, plan if warm_up else None, cases[0], backend, say)
    run = _Runs(work, plan, backend, dense, say)
    measured: list[CaseQuality] = []
    dense_runs: list[Recorded] = []
    videos: list[np.ndarray] = []
    for number, case in enumerate(cases):
        say(f"case {number + 1} of {len(cases)}: {case.prompt}, seed {case.seed}")
        if references is not None:
            stock, sparse = references[number], run.sparse(case)
        elif number % 2:
            sparse, stock = run.sparse(case), run.stock(case)
        else:
            stock, sparse = run.stock(case), run.sparse(case)
        floor = run.noise_floor(stock) if number < noise_cases else None
        measured.append(_compare(stock, sparse, floor))
        dense_runs.append(stock)
        videos.append(sparse.video)
    assert run.summary is not None and run.summary.density is not None
    return Quality(
        settings=settings,
        tokens=layout.seq_len,
        density=run.summary.density,
        forecast_speedup=forecast_speedup(plan),
        cases=measured,
        interleaved=references is None,
        summary=str(run.summary),
        sparse_calls=run.summary.sparse_calls,
        dense_calls=run.summary.dense_calls,
        references=dense_runs,
        sparse_videos=videos,
        layout=layout,
    )


def forecast_speedup(plan: Plan) -> float | None:
    """The speed-up that a plan promises, None if it doesn't say."""
    value = plan.forecast.get("speedup")
    return None if value is None else float(value)


class _Runs:
    """The three ways in which a case is generated."""

    def __init__(self, work: Workload, plan: Plan, backend: str, dense: str, say: Progress) -> None:
        self.work, self.plan, self.say = work, plan, say
        self.backend, self.dense = backend, dense
        self.summary: Summary | None = None

    def stock(self, case: Case) -> Recorded:
        self.say("  dense")
        return record(self.work, case)

    def sparse(self, case: Case) -> Recorded:
        self.say("  sparse")
        model, plan = self.work.model, self.plan
        with patch(model, plan, backend=self.backend, dense=self.dense) as handle:
            result = record(self.work, case)
        self.summary = handle.summary()
        return result

    def noise_floor(self, dense: Recorded) -> float:
        self.say("  noise floor")
        return psnr(noise_floor_video(self.work, dense.case), dense.video)


def _compare(dense: Recorded, sparse: Recorded, floor: float | None) -> CaseQuality:
    return CaseQuality(
        case=dense.case,
        dense_seconds=dense.taken.seconds,
        sparse_seconds=sparse.taken.seconds,
        dense_wall=dense.taken.wall,
        sparse_wall=sparse.taken.wall,
        psnr_db=psnr(sparse.video, dense.video),
        psnr_flat_db=flat_psnr(dense.video),
        psnr_noise_floor_db=floor,
        metrics={
            name: metric.measure(sparse.video, dense.video)
            if min(dense.video.shape[1:3]) >= metric.least_side
            else None
            for name, metric in METRICS.items()
        },
        drift=drift(sparse.latents, dense.latents),
        nonfinite_dense=nonfinite(dense.video),
        nonfinite_sparse=nonfinite(sparse.video),
    )


def _layout(
    work: Workload, plan: Plan | None, case: Case, backend: str, say: Progress
) -> TokenLayout:
    """Where the tokens lie, seen in a short dense run; a sparse one warms up a plan."""
    short, names = work.with_steps(min(2, work.settings.steps)), list(components(work.model))
    say("warm-up")
    with attached(work.model, dict.fromkeys(names, stock)) as attachments:
        short.run(case)
        layouts = [attachment.context.layout for attachment in attachments.values()]
    layout = next((layout for layout in layouts if layout is not None), None)
    if layout is None:
        listed = " and ".join(names)
        raise ValueError(f"the token layout of {listed} can't be told from the forwards' arguments")
    if plan is not None:
        with patch(work.model, plan, backend=backend):
            short.run(case)
    return layout


def _check(pipe: Any, cases: list[Case], references: Sequence[Recorded] | None) -> None:
    if not cases:
        raise ValueError("at least one prompt is needed to measure quality, got none")
    if references is not None and [r.case for r in references] != cases:
        raise ValueError("references must be dense results of the same cases, in the same order")
    unpatched(pipe)
