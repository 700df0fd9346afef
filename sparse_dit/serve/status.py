"""/v1/models, /health and /metrics: what is served, and how it is."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from .claims import READY, overdue
from .metrics import registry_of
from .options import Limits
from .plans import Served
from .service import Service
from .text.card import TextCard
from .troubles import Troubles

UNTOLD = "a worker ended before it was ready"


class PlanPoint(BaseModel):
    """A point of a plan's front.

    `seconds` is the forecast of a whole generation at the size and on the device that the plan was made for,
    `psnr_db` that of its PSNR against dense.
    """

    speedup: float
    density: float
    seconds: float
    psnr_db: float | None


class ServedPlan(BaseModel):
    """A plan that requests may name."""

    name: str
    density: float
    forecast: dict[str, Any]
    measured: dict[str, Any]
    settings: dict[str, Any]
    dense_seconds: float | None
    front: list[PlanPoint]


class Model(BaseModel):
    """What is served: the model, its defaults, its plans and the limits of requests."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sparse_dit"
    kind: Literal["video", "image"]
    takes_image: Literal["no", "may", "must"]
    defaults: dict[str, Any]
    fps: float
    default_plan: str
    plans: list[ServedPlan]
    limits: dict[str, Any]


class TextModel(BaseModel):
    """What is served if it writes text; `context` is in tokens, of prompt and text together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sparse_dit"
    kind: Literal["text"] = "text"
    context: int | None
    defaults: dict[str, Any]
    default_plan: str
    plans: list[ServedPlan]
    limits: dict[str, Any]


class Models(BaseModel):
    """A list of one."""

    object: Literal["list"] = "list"
    data: list[Model | TextModel]


class WorkerHealth(BaseModel):
    """A worker."""

    device: str
    state: str
    seconds_since_beat: float


class Trouble(BaseModel):
    """Why a worker ended before it was ready; where keys are set, the page and the log alone say more."""

    device: str
    message: str
    seconds_ago: float


class Health(BaseModel):
    """`ok` if a worker is ready, `loading` while none is yet, `failing` if none is there or can load."""

    status: Literal["ok", "loading", "failing"]
    workers: list[WorkerHealth]
    troubles: list[Trouble]
    jobs: dict[str, int]


def status_routes(service: Service, created: int) -> APIRouter:
    """The routes that need a key like all others."""
    routes = APIRouter(tags=["server"])

    @routes.get("/v1/models")
    def models() -> Models:
        """The model that is served, with its plans and their fronts."""
        return Models(data=[model_of(service, created)])

    @routes.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    registry = registry_of(service.store)
    return routes


def health_routes(service: Service) -> APIRouter:
    """The route that needs no key."""
    routes = APIRouter(tags=["server"])

    @routes.get("/health", responses={503: {"model": Health}})
    def health() -> JSONResponse:
        """Whether jobs are run; 503 if no worker is there."""
        found = health_of(service)
        if service.options.api_keys:  # who has none may still ask for the health
            for trouble in found.troubles:
                trouble.message = UNTOLD
        code = 503 if found.status == "failing" else 200
        return JSONResponse(found.model_dump(), status_code=code)

    return routes


def health_of(service: Service) -> Health:
    """How the workers are."""
    now, rows = service.store.now(), service.store.workers()
    workers = [
        WorkerHealth(
            device=row["device"],
            state=row["state"],
            seconds_since_beat=round(max(0.0, now - row["beat"]), 1),
        )
        for row in rows
        if row["model"] == service.card.name
    ]
    model = service.card.name
    states = {r["state"] for r in rows if r["model"] == model and not overdue(r, now)}
    troubles = [
        Trouble(device=row["device"], message=row["message"], seconds_ago=round(now - row["at"], 1))
        for row in Troubles(service.store).recent(model)
    ]
    status = "failing"
    if states & {*READY}:
        status = "ok"
    elif states and not troubles:
        status = "loading"
    return Health(status=status, workers=workers, troubles=troubles, jobs=service.store.counts())


def model_of(service: Service, created: int) -> Model | TextModel:
    """What is served."""
    card, limits = service.card, service.options.limits
    shared: dict[str, Any] = {
        "id": card.name,
        "created": created,
        "default_plan": card.default_plan,
        "plans": [_plan(one) for one in card.plans.values()],
    }
    if isinstance(card, TextCard):
        return TextModel(
            **shared,
            context=card.context,
            defaults={
                "max_tokens": card.writing.length,
                "block_length": card.writing.block,
                "num_inference_steps": card.writing.steps,
            },
            limits={name: getattr(limits, name) for name in ("body", "prompt", "steps", "rate")},
        )
    return Model(
        **shared,
        kind=card.kind,
        takes_image=card.takes_image,
        defaults=card.defaults.to_dict(),
        fps=card.fps,
        limits={name: getattr(limits, name) for name in Limits.__dataclass_fields__},
    )


def _plan(served: Served) -> ServedPlan:
    plan, front = served.plan, served.front
    points = [
        PlanPoint(speedup=p.speedup, density=p.density, seconds=p.seconds, psnr_db=p.psnr)
        for p in (front.points if front else ())
    ]
    return ServedPlan(
        name=served.name,
        density=plan.density,
        forecast=plan.forecast,
        measured=plan.measured,
        settings=served.settings,
        dense_seconds=front.dense_seconds if front else plan.forecast.get("dense_seconds"),
        front=points,
    )
