"""What the pages of the server share: templates, files, and the form that asks for a key."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from jinja2 import Environment

from ..version import VERSION
from .errors import ApiError, not_found
from .example import STATIC
from .security import COOKIE, Keyed, Limited, same_origin

KINDS = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".mp4": "video/mp4",
    ".svg": "image/svg+xml",
}
FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}  # the address has a hash
KEY_RATE = "10/minute"  # keys that one client may try
WITHIN = re.compile(r"/(jobs/[a-z]+_[0-9a-f]{32})?")


class Pages:
    """Renders pages for who has a key.

    Args:
        card: What is served.
        keyed: Who may look; others are asked for a key.
        filters: Filters for the templates, beside those of the report.
    """

    def __init__(self, card: Any, keyed: Keyed, **filters: Any) -> None:
        self._card, self._keyed = card, keyed
        self._templates, self.addresses = _templates(filters), _addresses()

    def text(self, name: str, **more: Any) -> str:
        """The HTML of a template."""
        template = self._templates.get_template(name)
        return template.render(static=self.addresses, version=VERSION, card=self._card, **more)

    def render(self, name: str, status: int = 200, **more: Any) -> HTMLResponse:
        """A page."""
        return HTMLResponse(self.text(name, **more), status)

    def stranger(self, request: Request) -> HTMLResponse | None:
        """The form that asks for a key, unless there is one."""
        try:
            self._keyed(request)
        except ApiError as error:
            return self.render("key.html.j2", error.status, next=request.url.path, wrong=False)
        return None

    def routes(self) -> APIRouter:
        """The routes of the form and of the files, which are no part of the API's description."""
        routes = APIRouter(include_in_schema=False)

        @routes.post("/key", dependencies=[Depends(same_origin), Depends(Limited(KEY_RATE))])
        def key(
            request: Request,
            key: Annotated[str, Form(max_length=512)],
            next: Annotated[str, Form(max_length=128)] = "/",
        ) -> Response:
            """Keep a key in a cookie, which scripts can't read."""
            target = next if WITHIN.fullmatch(next) else "/"
            if self.stranger(request) is None:
                return RedirectResponse(target, 303)
            if not self._keyed.knows(key):
                return self.render("key.html.j2", 401, next=target, wrong=True)
            answer = RedirectResponse(target, 303)
            secure = request.url.scheme == "https"
            answer.set_cookie(COOKIE, key.strip(), httponly=True, samesite="strict", secure=secure)
            return answer

        @routes.get("/static/{name}")
        def static(name: str) -> Response:
            """The style, the script, the icon."""
            if name not in self.addresses:
                raise not_found("there is no such file")
            kind = KINDS[Path(name).suffix]
            return FileResponse(STATIC / name, media_type=kind, headers=FOREVER)

        return routes


def _addresses() -> dict[str, str]:
    """Where browsers find the files of `static`: another address when a file has changed."""
    return {
        file.name: f"/static/{file.name}?{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
        for file in STATIC.iterdir()
        if file.suffix in KINDS
    }


def _templates(filters: dict[str, Any]) -> Environment:
    from ..eval.page import environment

    made = environment("sparse_dit.serve")
    made.filters.update(filters)
    return made
