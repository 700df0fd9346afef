"""Who may ask, how often, and what browsers may do with an answer."""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

COOKIE = "sparse_dit_key"  # how the page, whose <video> can't send a header, gives the key
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; object-src 'none'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Keyed:
    """A dependency that refuses requests without one of the keys; without keys it lets all pass.

    The key comes as `Authorization: Bearer KEY` or in the cookie `sparse_dit_key`.

    Args:
        keys: Any of them will do.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __call__(self, request: Request) -> None:
        """Raise ApiError unless the request may pass."""
        if not self._keys:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = request.cookies.get(COOKIE, "")
        if not self.knows(given):
            raise ApiError(
                401,
                "invalid_api_key",
                "give a valid API key as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def knows(self, given: str) -> bool:
        """Whether it is one of the keys, found in a time that doesn't tell how nearly."""
        given_bytes = given.strip().encode("utf-8", "surrogateescape")
        return max(hmac.compare_digest(given_bytes, key) for key in self._keys)


class Limited:
    """A dependency that refuses a client who submits too often.

    Args:
        rate: As the package limits writes it: `120/minute`.
    """

    def __init__(self, rate: str) -> None:
        self._rate = parse(rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, request: Request) -> None:
        """Raise ApiError if there were too many of them."""
        client = request.client.host if request.client else "unknown"
        if not self._limiter.hit(self._rate, client):
            until = self._limiter.get_window_stats(self._rate, client).reset_time
            wait = max(1, round(until - time.time()))
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"at most {self._rate} are taken from one client",
                headers={"Retry-After": str(wait)},
            )


def same_origin(request: Request) -> None:
    """A dependency that refuses what a browser sends for another site's page; raises ApiError.

    Forms of any site reach a server on the same machine, and need no permission for it. What is only looked
    at needs no such guard: the browser keeps the answer from the page.
    """
    if request.method in ("GET", "HEAD"):
        return
    origin = request.headers.get("origin")
    foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    if foreign or request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise ApiError(403, "cross_origin", "requests from other sites' pages are refused")


class SafeHeaders:
    """Middleware that adds the headers that keep browsers from doing more than they should.

    Args:
        app: The app.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: Any = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, sending)
