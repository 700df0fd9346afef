"""The server as an ASGI app: its routes, and what runs beside it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..version import VERSION
from .claims import Claims
from .errors import add_handlers
from .housekeeping import Housekeeping
from .images import image_routes
from .one_job import job_routes
from .page import page_routes
from .security import Keyed, Limited, SafeHeaders, same_origin
from .service import Service
from .status import health_routes, status_routes
from .supervisor import Supervisor
from .text.completions import completion_routes
from .text.page import text_page_routes
from .videos import video_routes
from .worker import WorkerOptions


def create_app(service: Service, workers: Sequence[WorkerOptions] = ()) -> FastAPI:
    """The app of a server.

    Args:
        service: What it serves.
        workers: The workers that are started with it; none if others run the jobs.
    """
    options = service.options
    app = FastAPIOffline(
        redoc_url=None,
        title="sparse_dit",
        version=VERSION,
        description="Generations of a diffusion model with sparse attention.",
        lifespan=_lifespan(service, workers),
    )
    add_handlers(app)
    keyed, limited = Keyed(options.api_keys), Limited(options.limits.rate)
    text = service.card.kind == "text"
    made = [completion_routes(service, limited)] if text else _pictures(service, limited)
    for routes in (*made, status_routes(service, int(time.time()))):
        app.include_router(routes, dependencies=[Depends(same_origin), Depends(keyed)])
    app.include_router(health_routes(service))

    app.include_router((text_page_routes if text else page_routes)(service, keyed))
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=options.limits.body)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(options.hosts))
    app.add_middleware(SafeHeaders)
    return app


def _pictures(service: Service, limited: Limited) -> list[APIRouter]:
    return [
        video_routes(service, limited),
        job_routes(service, "video"),
        image_routes(service, limited),
        job_routes(service, "image"),
    ]


def _lifespan(service: Service, workers: Sequence[WorkerOptions]) -> Callable[[Any], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.callback(service.store.close)
            keeping = Housekeeping(service.store, service.files, service.options)
            keeping.start()
            stack.callback(keeping.stop)
            if workers:
                supervisor = Supervisor(workers, Claims(service.store))
                supervisor.start()
                app.state.supervisor = supervisor
                stack.callback(supervisor.stop)
            yield

    return lifespan
