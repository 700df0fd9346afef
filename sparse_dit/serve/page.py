"""The page that people open: a form, one job with what came out, and the jobs before it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response

from .answers import Video, variants_of, video_of
from .dial import PlanChoice, plan_choices, sizes
from .errors import not_found
from .example import SHOWN, Example, example_name, shipped_example
from .jobs import Job
from .pages import Pages
from .plans import DENSE
from .security import Keyed
from .service import Service
from .status import health_of

HISTORY = 12  # jobs that are shown at once
LOOKED_AT = 100  # of the newest jobs, for one to begin with


@dataclass(frozen=True)
class Shown:
    """What a view of the page is about.

    Attributes:
        job: The job; None where there is none yet.
        example: Whether it is there because nothing else was asked for.
        shipped: What is shown in the place of a job, as there is none yet.
        wrong: What isn't there.
    """

    job: Job | None
    example: bool = False
    shipped: Example | None = None
    wrong: str | None = None


def page_routes(service: Service, keyed: Keyed) -> APIRouter:
    """The routes of the page, which are no part of the API's description.

    Args:
        service: What they show.
        keyed: Who may look; others are asked for a key.
    """
    pages = Pages(service.card, keyed, against_dense=_against_dense)
    routes = pages.routes()
    choices = plan_choices(service.pictured)
    offered = sizes(service.pictured, service.options.limits)

    def view(request: Request, shown: Shown, after: str | None, status: int = 200) -> HTMLResponse:
        jobs, more = service.store.list(
            service.card.kind, after=after, limit=HISTORY, order="desc"
        ) or ([], False)
        job = shown.job
        return pages.render(
            "page.html.j2",
            status,
            shown=shown,
            video=_video(shown),
            contents=_contents(shown, pages.addresses),
            address="" if job is None else f"{request.base_url}jobs/{job.id}",
            history=[video_of(one, whole=False) for one in jobs],
            older=jobs[-1].id if more else None,
            after=after,
            values=_values(service, choices, None if shown.example else job),
            choices=choices,
            dense=DENSE,
            sizes=offered,
            limits=service.options.limits,
            health=health_of(service),
        )

    @routes.get("/")
    def home(
        request: Request, after: Annotated[str | None, Query(max_length=64)] = None
    ) -> Response:
        """The page with a finished job as an example."""
        return pages.stranger(request) or view(request, _first(service), after)

    @routes.get("/jobs/{id}")
    def one(request: Request, id: str) -> Response:
        """The page with a job."""
        if ask := pages.stranger(request):
            return ask
        job = service.store.get(id, service.card.kind)
        if job is None:
            wrong = "There is no such job: it was deleted, or its time was over."
            return view(request, Shown(None, wrong=wrong), None, 404)
        return view(request, Shown(job), None)

    @routes.get("/jobs/{id}/atlas")
    def atlas(request: Request, id: str) -> Response:
        """The atlas of the heads of a job's plan."""
        if ask := pages.stranger(request):
            return ask
        spec = service.job(id, service.card.kind).picture
        if spec.plan not in service.card.plans:
            raise not_found("the job ran dense, or its plan is no longer served")
        return HTMLResponse(drawn(spec.plan, spec.speedup))

    @functools.lru_cache(maxsize=8)
    def drawn(name: str, speedup: float | None) -> str:
        from ..eval.command import plan_atlases  # which draw, and are slow to import
        from ..eval.page import opened, pictured

        atlases = plan_atlases(service.card.plans[name].at(speedup), {})
        shown = {"atlases": pictured(atlases), "opened": opened(atlases)}
        return pages.text("heads.html.j2", plan=name, **shown)

    return routes


def _first(service: Service) -> Shown:
    """The newest finished job, one that was compared if there is any; without one, what ships."""
    jobs, _ = service.store.list(service.card.kind, after=None, limit=LOOKED_AT, order="desc") or (
        [],
        False,
    )
    done = [job for job in jobs if job.status == "completed"]
    found = next((job for job in done if job.picture.compare), next(iter(done), None))
    if found is None and service.card.kind == "video":
        return Shown(None, True, shipped_example())
    return Shown(found, True)


def _video(shown: Shown) -> Video | None:
    """What is said of what is shown."""
    if shown.job is not None:
        return video_of(shown.job)
    return shown.shipped.video if shown.shipped else None


def _contents(shown: Shown, addresses: dict[str, str]) -> dict[str, str]:
    """Where browsers find what a job made, by variant."""
    if shown.job is not None:
        at = f"/v1/{shown.job.spec.kind}s/{shown.job.id}/content?variant="
        return {variant: at + variant for variant in variants_of(shown.job)}
    return {name: addresses[example_name(name)] for name in SHOWN} if shown.shipped else {}


def _values(service: Service, choices: list[PlanChoice], job: Job | None) -> dict[str, Any]:
    """What the form holds at first: the defaults, or what a job was asked for."""
    defaults = service.pictured.defaults
    if job is None:
        chosen = choices[0] if choices else None
        return {
            "prompt": "",
            "negative_prompt": defaults.negative_prompt or "",
            "seed": "",
            "size": f"{defaults.width}x{defaults.height}",
            "num_frames": defaults.num_frames,
            "steps": defaults.steps,
            "guidance": defaults.guidance,
            "plan": service.card.default_plan,
            "stop": chosen.at if chosen else 0,
            "compare": chosen is not None,
        }
    spec = job.picture
    chosen = next((one for one in choices if one.name == spec.plan), None)
    return {
        "prompt": spec.prompt,
        "negative_prompt": spec.negative_prompt or "",
        "seed": spec.seed,
        "size": f"{spec.width}x{spec.height}",
        "num_frames": spec.num_frames,
        "steps": spec.steps,
        "guidance": spec.guidance,
        "plan": spec.plan,
        "stop": chosen.at_speedup(spec.speedup) if chosen else 0,
        "compare": spec.compare or chosen is None,
    }


def _against_dense(video: Video) -> float | None:
    """The speed-up that was measured."""
    if not video.dense_time_s or not video.inference_time_s:
        return None
    return video.dense_time_s / video.inference_time_s
