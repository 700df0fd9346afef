"""How much an error in attention moves the final video, by noise level and layer: measured, not assumed.

Every head gets the same local pattern at the noise levels of one stage, and both its error and the change
of the finished video are measured. A pattern's error is alike at every step and smooth over the video, which
moves the result far more than random noise of the same size. It is done at a reduced size, where a
generation is cheap, and up to the probed stage every run is the clean one's: what the transformers gave
there is played back.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..call import AttentionCall, Intercept
from ..generation import Case
from ..index import build_index
from ..integrations import Workload, attach, attached, components
from ..plan import Stage
from .cells import sample_rows
from .cost import nearest_tiles
from .sampling import attention_over, exact_rows, in_turn, whole_layout
from .verify import check_stock, stock

Result = TypeVar("Result")
WHOLE = Stage(1.0, 0.0)
LAYER_GROUPS = 8
PROBE_BUDGET = 0.25  # share of the pairs that the probing pattern computes
ERROR_ROWS = 128  # tokens in which its error is measured


class _Probe:
    """An intercept that computes a local pattern while sigma is inside a stage, and notes its error.

    The error is that of one half of guidance at a time, see `in_turn`, in sampled rows.

    Args:
        stage: Noise levels to disturb.
        layers: Module paths of the layers to disturb; None for all.
    """

    def __init__(self, stage: Stage, layers: Collection[str] | None = None) -> None:
        self.stage = stage
        self.layers = layers
        self.errors: list[float] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        if self.layers is not None and call.layer not in self.layers:
            return call.stock()
        sigma, layout = call.context.sigma, whole_layout(call)
        if sigma is None or layout is None or not self.stage.covers(sigma, "any"):
            return call.stock()
        pattern = nearest_tiles(layout, PROBE_BUDGET, far=False)
        probed = attention_over(call, build_index([pattern] * call.q.shape[2], layout))
        if in_turn(call.context):
            rows = sample_rows(layout, ERROR_ROWS, torch.Generator().manual_seed(0))
            out = exact_rows(call, rows).float()
            power = out.square().sum((1, 3)).clamp_min(1e-20)
            wrong = probed[:, rows.to(probed.device)].float() - out
            self.errors.append((wrong.square().sum((1, 3)) / power).mean().item())
        return probed


@dataclass(frozen=True)
class Sensitivity:
    """How much an error moves the output.

    Args:
        stages: For each noise level the change of the output (in `Workload.loss`) for a squared relative
            error of 1 in every head.
        layers: For each layer its share in that; sums to 1.
    """

    stages: list[float]
    layers: list[float]


def sensitivity(
    work: Workload,
    component: str,
    stages: Sequence[Stage],
    layers: Sequence[str],
    case: Case,
    *,
    levels: int | None = None,
    report: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Disturb every noise level in turn, then every layer (groups of neighbours, if there are many).

    Args:
        work: What is run, at a size where that is cheap; the model is not patched.
        component: The name of the transformer that is probed; others stay stock.
        stages: Noise levels to test, one after the other. One that no step of these runs falls into gets
            the larger number of the nearest on both sides.
        layers: Module paths, in order of execution.
        case: The prompt and seed that is run.
        levels: Noise levels of all transformers of the pipeline, so that each runs when layers are probed;
            those of this one if None.
        report: Called with a line of text after each of these runs.

    Raises:
        ValueError: If the stock model gives NaN or Inf.
    """
    groups = _groups(layers)
    counted = _Progress(component, 2 + len(stages) + len(groups), report)
    probe = _prober(work, component, case, counted(_clean(work, case)))
    of_stages = filled([counted(probe(stage, None)) for stage in stages])
    # what layers share hardly depends on the steps, nor on guidance
    few = work.plain().with_steps(max(4, levels or len(stages)))
    probe = _prober(few, component, case, counted(_clean(few, case)))
    return Sensitivity(of_stages, _shares([(g, counted(probe(WHOLE, g))) for g in groups]))


class _Progress:
    """A report after each run of how many are done, and how long the others take if they take as long.

    Args:
        component: The name of the transformer that the runs disturb.
        total: How many runs there will be.
        report: Called with the line of text; None for silence.
    """

    def __init__(self, component: str, total: int, report: Callable[[str], None] | None) -> None:
        self._component = component
        self._total = total
        self._report = report
        self._done = 0
        self._started = time.perf_counter()

    def __call__(self, result: Result) -> Result:
        """Count a run; gives back its result."""
        self._done += 1
        if self._report is not None:
            left = (time.perf_counter() - self._started) / self._done * (self._total - self._done)
            self._report(
                f"sensitivity of {self._component} {self._done} of {self._total}, about {left:.0f} s left"
            )
        return result


Forward = tuple[str, float, Any]  # the component's name, the noise level, what the forward gave


@dataclass(frozen=True, eq=False)
class _Clean:
    """An undisturbed run: its output, as `Workload.run` gives it, and all forwards in order."""

    output: Any
    forwards: list[Forward]

    def before(self, component: str, stage: Stage) -> dict[str, list[Any]] | None:
        """What each transformer gave until this one first ran in the stage; None if it never did."""
        given: dict[str, list[Any]] = {name: [] for name, _, _ in self.forwards}
        for name, sigma, output in self.forwards:
            if name == component and stage.covers(sigma, "any"):
                return given
            given[name].append(output)
        return None


def _clean(work: Workload, case: Case) -> _Clean:
    """Run a case and keep what every transformer gives."""
    with recording(work.model) as forwards:
        output, _ = work.run(case)
    check_stock(work, case, output)
    return _Clean(output, forwards)


def _prober(
    work: Workload, component: str, case: Case, clean: _Clean
) -> Callable[[Stage, Collection[str] | None], float | None]:
    """A function that measures by how much an error of some layers at a stage changes the output."""

    def probe(stage: Stage, layers: Collection[str] | None) -> float | None:
        given = clean.before(component, stage)
        if given is None:
            return None
        intercept = _Probe(stage, layers)
        with contextlib.ExitStack() as stack:
            for name, transformer in components(work.model).items():
                sees = intercept if name == component else stock
                stack.enter_context(replaying(transformer, given.get(name, ()), sees, work.model))
            output, _ = work.run(case)
        if not intercept.errors:
            return None
        change = work.difference(output, clean.output)[work.loss]
        return change / max(float(np.mean(intercept.errors)), 1e-12)

    return probe


def _groups(layers: Sequence[str]) -> list[Sequence[str]]:
    """Neighbouring layers, in at most `LAYER_GROUPS` groups of about equal size."""
    count = min(LAYER_GROUPS, len(layers))
    bounds = [len(layers) * n // count for n in range(count + 1)]
    return [layers[a:b] for a, b in itertools.pairwise(bounds)]


def _shares(groups: Sequence[tuple[Sequence[str], float | None]]) -> list[float]:
    """The groups' sensitivities as shares of single layers; equal ones if none could be told."""
    total = sum(value or 0.0 for _, value in groups)
    if total <= 0:
        count = sum(len(names) for names, _ in groups)
        return [1 / count] * count
    return [(value or 0.0) / total / len(names) for names, value in groups for _ in names]


def filled(values: Sequence[float | None]) -> list[float]:
    """Gaps filled with the larger one of the nearest known values on both sides.

    Raises:
        ValueError: If nothing is known.
    """
    if all(value is None for value in values):
        raise ValueError("no step of a generation falls into any recorded noise level")
    result = []
    for place in range(len(values)):
        before = [v for v in values[: place + 1] if v is not None][-1:]
        after = [v for v in values[place:] if v is not None][:1]
        result.append(max(before + after))
    return result


@contextlib.contextmanager
def recording(model: Any) -> Iterator[list[Forward]]:
    """Inside the block every forward of a model's components is added to a list.

    A forward whose noise level can't be told counts as pure noise, 1.
    """
    found, record = components(model), []
    with (
        attached(model, dict.fromkeys(found, stock)) as attachments,
        contextlib.ExitStack() as stack,
    ):
        for name, module in found.items():

            def note(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
                sigma = attachments[name].context.sigma
                record.append((name, 1.0 if sigma is None else sigma, output))

            stack.callback(module.register_forward_hook(note).remove)
        yield record


@contextlib.contextmanager
def replaying(
    transformer: nn.Module, outputs: Sequence[Any], intercept: Intercept, pipe: Any = None
) -> Iterator[None]:
    """Inside the block the first forwards return `outputs`, unread; the others run with `intercept`.

    Args:
        transformer, intercept, pipe: See `attach`.
        outputs: What the first forwards of the same generation returned; hosts don't write to them.
    """
    before = vars(transformer).get("forward")  # offloading puts its own there
    run, waiting = transformer.forward, list(reversed(outputs))

    @functools.wraps(run)  # hosts drop keyword arguments that its signature lacks
    def forward(*args: Any, **kwargs: Any) -> Any:
        return waiting.pop() if waiting else run(*args, **kwargs)

    attachment = attach(transformer, intercept, pipe)
    transformer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del transformer.forward
        else:
            transformer.forward = before
        attachment.detach()
