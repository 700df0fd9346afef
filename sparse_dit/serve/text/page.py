"""The page of a server that writes: a form, and the canvas on which the text appears."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..pages import Pages
from ..plans import DENSE
from ..security import Keyed
from ..service import Service
from ..status import health_of


def text_page_routes(service: Service, keyed: Keyed) -> APIRouter:
    """The routes of the page, which are no part of the API's description.

    Args:
        service: What it shows.
        keyed: Who may look; others are asked for a key.
    """
    pages = Pages(service.card, keyed)
    routes = pages.routes()

    @routes.get("/")
    def home(request: Request) -> Response:
        """The page."""
        return pages.stranger(request) or pages.render(
            "text.html.j2",
            plans=service.card.plans.names,
            dense=DENSE,
            limits=service.options.limits,
            health=health_of(service),
        )

    return routes
