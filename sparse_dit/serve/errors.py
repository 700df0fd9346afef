"""Errors in the shape that clients of the API expect."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

KINDS = {  # of error, by HTTP status
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that isn't a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that isn't a success.

    Args:
        status: HTTP status.
        code: For programs.
        message: For people.
        param: The field of the request that it is about.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.headers = param, headers


def invalid(message: str, param: str | None = None) -> ApiError:
    """A request that can't be met as it is."""
    return ApiError(400, "invalid_request", message, param)


def not_found(what: str) -> ApiError:
    """Something that isn't there."""
    return ApiError(404, "not_found", what)


def invalid_field(error: ValidationError | RequestValidationError) -> ApiError:
    """The first field of a request that is wrong."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return invalid(f"the body must be JSON: {reason} (character {first['loc'][-1]})")
    places = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = ".".join(places) or None
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{name}: {message}" if name else message, name)


def detail_of(error: ApiError) -> ErrorDetail:
    """What clients are told of an error."""
    kind = KINDS.get(
        error.status, "server_error" if error.status >= 500 else "invalid_request_error"
    )
    return ErrorDetail(message=error.message, type=kind, param=error.param, code=error.code)


def answer(error: ApiError) -> JSONResponse:
    """The answer of an error."""
    body = ErrorBody(error=detail_of(error)).model_dump()
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def add_handlers(app: FastAPI) -> None:
    """Let every error of an app have this shape."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def fields(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(invalid_field(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = str(error.detail).lower().replace(" ", "_")
        headers: Any = error.headers
        return answer(ApiError(error.status_code, code, str(error.detail), None, headers))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return answer(
            ApiError(500, "internal_error", "something failed on the server; see its log")
        )
