"""The whole front of a search: every point between dense and the fastest, kept beside the plan.

A search answers one question; another speed or density is another point of the same problem, and takes no
new search. The file holds the front of an archive: the best choice of each bin of latency and density.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import lzma
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..patterns import Pattern
from ..plan import ComponentPlan, HeadChoice, Plan, PlanError, config_hash
from ..plan.evidence import without_evidence
from ..texts import read_text
from ..whole_file import write_text
from .archive import explore
from .caching import measured_scale
from .solve import Choice, Problem

FORMAT = (
    "sparse_dit front 2"  # version 1 had the patterns as they are, which made files of megabytes
)
MOST_BYTES = 256 << 20  # of unpacked patterns
MOST_PSNR = 100.0  # what videos that are equal count as
Measure = Literal["speedup", "density", "error", "psnr", "kl"]
GREATER_IS_BETTER = ("speedup", "psnr")
FASTEST_WITHIN = ("error", "psnr", "kl")  # what a plan must keep; the others say how fast it is


class Point(BaseModel):
    """One choice: its forecasts, and for each unit the number of its pattern and its error.

    Units go by component, stage, layer and head, in the order of the plan's.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    speedup: float = Field(gt=0)
    density: float = Field(ge=0, le=1)
    error: float = Field(ge=0)
    seconds: float = Field(gt=0)
    psnr: float | None = None  # dB, forecast
    kl: float | None = None  # nats a token, forecast; of a language model
    patterns: list[int]
    errors: list[float | None]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal["sparse_dit front 1", "sparse_dit front 2"]
    config_hash: str
    dense_seconds: float = Field(gt=0)
    patterns: list[dict[str, Any]] | str  # JSON, compressed by lzma, in base64
    masks: dict[str, str]
    levels: dict[str, list[Any]] = {}  # of plans with merged stages, which an earlier version made
    points: list[Point] = Field(min_length=1)


@dataclass(frozen=True)
class Front:
    """Points by rising speed-up, and the patterns that they number.

    Args:
        config_hash: The hash of the model that it was searched for, see `model_hash`.
        dense_seconds: The seconds of a dense generation.
        patterns: All patterns that the points use, each once.
        points: The choices, each with the number of every head's pattern in `patterns`.
    """

    config_hash: str
    dense_seconds: float
    patterns: tuple[Pattern, ...]
    points: tuple[Point, ...]


def model_hash(components: Mapping[str, ComponentPlan]) -> str:
    """What tells models apart: a transformer's `config_hash`; of several, a hash of theirs by name."""
    hashes = {name: part.config_hash for name, part in components.items()}
    return config_hash(hashes) if len(hashes) > 1 else next(iter(hashes.values()))


def front_of(
    task: Problem,
    config_hash: str,
    found: Choice,
    *,
    psnr_db: float | None = None,
    cached_psnr_db: float | None = None,
    kl_of_loss: float | None = None,
    heads: Callable[[Choice], Sequence[HeadChoice]] | None = None,
) -> Front:
    """The front of an archive of the problem; `found` is kept in any case.

    Args:
        task: The problem that was searched.
        config_hash: The hash of the model, see `model_hash`.
        found: The choice that the search made.
        psnr_db: The measured PSNR of `found`; that of the others is forecast from it, as the squared error
            of the video is in proportion to the loss.
        cached_psnr_db: The PSNR of a step cache alone, which every point has, as a mean like that of `found`.
        kl_of_loss: The divergence from dense of a language model, in nats a token for each unit of loss, as
            measured.
        heads: A choice as the plan's heads, in its order; each unit is a head if None.
    """
    listed = heads or functools.partial(_heads, task)
    choices = [*explore(task, [found]).front(), found]
    choices.sort(key=lambda choice: (choice.speedup, -choice.loss))
    numbers: dict[Pattern, int] = {}
    points: list[Point] = []
    for choice in choices:
        of_heads = listed(choice)
        point = Point(
            speedup=round(choice.speedup, 4),
            density=round(choice.density, 6),
            error=round(choice.error, 6),
            seconds=float(f"{choice.seconds:.5g}"),
            psnr=_psnr(choice, found, psnr_db, cached_psnr_db),
            kl=None if kl_of_loss is None else round(choice.loss * kl_of_loss, 6),
            patterns=[numbers.setdefault(head.pattern, len(numbers)) for head in of_heads],
            errors=[None if head.error is None else round(head.error, 5) for head in of_heads],
        )
        if not points or point.patterns != points[-1].patterns:
            points.append(point)
    return Front(config_hash, task.dense_seconds, tuple(numbers), tuple(points))


def thinned(front: Front, speedups: Sequence[float]) -> Front:
    """The points of a front that are nearest to these speed-ups, with the patterns that they use."""
    chosen = {
        min(range(len(front.points)), key=lambda n: abs(front.points[n].speedup - one))
        for one in speedups
    }
    numbers: dict[int, int] = {}
    points = []
    for place in sorted(chosen):
        point = front.points[place]
        patterns = [numbers.setdefault(number, len(numbers)) for number in point.patterns]
        points.append(point.model_copy(update={"patterns": patterns}))
    return replace(front, patterns=tuple(front.patterns[n] for n in numbers), points=tuple(points))


def _heads(task: Problem, choice: Choice) -> list[HeadChoice]:
    """A head for each unit."""
    errors = task.error.gather(1, choice.pick[:, None])[:, 0].sqrt().tolist()
    picks = zip(task.candidates, choice.pick.tolist(), errors, strict=True)
    return [HeadChoice(candidates[pick], error) for candidates, pick, error in picks]


def _psnr(
    choice: Choice, found: Choice, psnr_db: float | None, cached: float | None = None
) -> float | None:
    """Forecast in dB; None if nothing was measured that tells."""
    if psnr_db is None or found.loss <= 0:
        return None
    measured = 10 ** (-psnr_db / 10)
    spoilt = 0.0 if cached is None else 10 ** (-cached / 10)
    error = spoilt + measured_scale(measured, found.loss, spoilt) * choice.loss
    if error <= 0:
        return MOST_PSNR
    return round(min(MOST_PSNR, -10 * math.log10(error)), 2)


def front_path(plan_file: Path) -> Path:
    """Where a plan's front lies: `plan.json` has `plan.front.json`."""
    return plan_file.with_name(f"{plan_file.stem}.front.json")


def write_front(front: Front, path: Path) -> None:
    """Write as JSON; the file appears whole or not at all."""
    masks: dict[str, str] = {}
    for pattern in front.patterns:
        for name, bits in pattern.tensors().items():
            masks[name] = base64.b64encode(bytes(bits.tolist())).decode()
    file = _File(
        format=FORMAT,
        config_hash=front.config_hash,
        dense_seconds=front.dense_seconds,
        patterns=_packed([pattern.to_dict() for pattern in front.patterns]),
        masks=masks,
        points=list(front.points),
    )
    write_text(path, file.model_dump_json(exclude_defaults=True))


def read_front(path: Path) -> Front:
    """Inverse of `write_front`.

    Raises:
        PlanError: If the file is missing, damaged or of another kind; in one line.
    """
    if not path.is_file():
        raise PlanError(f"{path}: no such file; a search writes it beside its plan")
    try:
        file = _File.model_validate(json.loads(read_text(path)))
        tensors = {
            name: torch.frombuffer(
                bytearray(base64.b64decode(bits, validate=True)), dtype=torch.uint8
            )
            for name, bits in file.masks.items()
        }
        listed = _unpacked(file.patterns) if isinstance(file.patterns, str) else file.patterns
        patterns = tuple(Pattern.from_dict(data, tensors) for data in listed)
        _check(file, len(patterns))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{path}: {place}: {first['msg']}; search again") from None
    except (ValueError, RecursionError, lzma.LZMAError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PlanError(f"{path}: damaged ({reason:.200}); search again") from None
    return Front(file.config_hash, file.dense_seconds, patterns, tuple(file.points))


def _packed(patterns: list[dict[str, Any]]) -> str:
    text = json.dumps(patterns, separators=(",", ":"))
    return base64.b64encode(lzma.compress(text.encode())).decode()


def _unpacked(text: str) -> list[dict[str, Any]]:
    reader = lzma.LZMADecompressor(memlimit=MOST_BYTES)
    data = reader.decompress(base64.b64decode(text, validate=True), max_length=MOST_BYTES)
    if not reader.eof:
        raise ValueError(f"patterns must be whole, and at most {MOST_BYTES >> 20} MiB")
    listed = json.loads(data)
    if not isinstance(listed, list):
        raise ValueError("patterns must be a list")
    return listed


def _check(file: _File, count: int) -> None:
    """Raise ValueError unless every point numbers patterns that are there, for equally many units."""
    units = len(file.points[0].patterns)
    for number, point in enumerate(file.points):
        if len(point.patterns) != units or len(point.errors) != units or not units:
            raise ValueError(f"point {number} must have patterns and errors of {units} heads")
        if not all(0 <= n < count for n in point.patterns):
            raise ValueError(f"point {number} names a pattern that isn't there")
        if not all(e is None or e >= 0 for e in point.errors):
            raise ValueError(f"point {number} has a negative error")


def parse_pick(text: str) -> tuple[Measure, float]:
    """Which point of a front is asked for: `"speedup=2.0"` is read as `("speedup", 2.0)`; see `pick`.

    Raises:
        ValueError: If the text isn't the name of a measure, an equals sign and a finite number above 0.
    """
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    measure = next((known for known in get_args(Measure) if known == name), None)
    if measure is None or not 0 < value < float("inf"):
        raise ValueError(
            f"a pick must be one of {', '.join(f'{n}=NUMBER' for n in get_args(Measure))}, got {text!r}"
        )
    return measure, value


def pick(plan: Plan, front: Front, measure: Measure, value: float) -> Plan:
    """A point of a front as a plan, without what was measured of the plan that the search wrote.

    It is the point of least error with at least that speed-up or at most that density, or the fastest one
    with at most that error or forecast divergence, or at least that forecast PSNR.

    Args:
        plan: The plan that the search wrote.
        front: The front that lies beside it.
        measure: What is asked for: `"speedup"`, `"density"`, `"error"`, `"psnr"` or `"kl"`.
        value: How much of it, in dB for `"psnr"`, in nats a token for `"kl"`.

    Raises:
        ValueError: If the front belongs to another model or plan, or no point is like that.
    """
    units = sum(map(_units, plan.components.values()))
    same_model = model_hash(plan.components) == front.config_hash
    if not same_model or len(front.points[0].patterns) != units:
        raise ValueError("the front belongs to another model or plan; search again")
    point = _chosen(front.points, measure, value)
    pairs = zip(point.patterns, point.errors, strict=True)
    heads = iter([HeadChoice(front.patterns[number], error) for number, error in pairs])
    components = {name: _filled(part, heads) for name, part in plan.components.items()}
    forecast = {
        "speedup": point.speedup,
        "error": point.error,
        "seconds": point.seconds,
        "dense_seconds": round(front.dense_seconds, 4),
    }
    if point.psnr is not None:
        forecast["psnr_db"] = point.psnr
    if point.kl is not None:
        forecast["kl"] = point.kl
    return replace(
        plan,
        components=components,
        density=point.density,
        provenance={**without_evidence(plan.provenance), "objective": {measure: value}},
        forecast=forecast,
        measured={},
    )


def _units(part: ComponentPlan) -> int:
    return len(part.stages) * part.total_heads


def _filled(part: ComponentPlan, heads: Iterator[HeadChoice]) -> ComponentPlan:
    """The component with the next heads in the place of its own."""
    rows: dict[str, list[tuple[HeadChoice, ...]]] = {layer: [] for layer in part.layers}
    for _ in part.stages:
        for layer, stages in rows.items():
            stages.append(tuple(itertools.islice(heads, part.heads[layer][0])))
    return replace(part, layers={layer: tuple(stages) for layer, stages in rows.items()})


def _chosen(points: Sequence[Point], measure: Measure, value: float) -> Point:
    known = [point for point in points if getattr(point, measure) is not None]
    if not known:
        raise ValueError(
            f"the front must hold a forecast of the {measure} to pick by it, got none: its search had "
            "nothing to forecast that by; pick by speedup, density or error"
        )
    sign = 1 if measure in GREATER_IS_BETTER else -1
    good = [p for p in known if sign * getattr(p, measure) >= sign * value]
    if measure in FASTEST_WITHIN:
        best = max(good, key=lambda p: p.speedup, default=None)
    else:
        best = min(good, key=lambda p: (p.error, -p.speedup), default=None)
    if best is None:
        low, high = (f([getattr(p, measure) for p in known]) for f in (min, max))
        raise ValueError(
            f"no point with {measure} {value:g}: the front goes from {low:g} to {high:g}"
        )
    return best
