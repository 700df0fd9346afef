"""What clients send: the bodies of requests, as JSON or as a form."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import UploadFile

from ..generation import MAX_SEED
from ..texts import unfit
from .errors import ApiError, invalid, invalid_field

MOST_FORM_FIELDS = 64
SIZE = r"^[1-9]\d{0,4}x[1-9]\d{0,4}$"
Asked = TypeVar("Asked", bound="JobRequest")
_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1, le=1 << 16)]
_Scale = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


class ImageReference(BaseModel):
    """An image in the request itself."""

    model_config = ConfigDict(extra="forbid")

    image_url: str = Field(
        description="A data: URL. No other URL is opened.", pattern="^data:image/"
    )


class GenerationRequest(BaseModel):
    """What videos and images have in common. What is left out is as the plan was made with."""

    model_config = ConfigDict(extra="forbid")

    prompt: _Text
    model: str | None = Field(default=None, description="Name of the model; see /v1/models.")
    size: str | None = Field(default=None, pattern=SIZE, description="WIDTHxHEIGHT in pixels.")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="Of the noise; drawn at random if left out."
    )
    negative_prompt: _Text | None = None
    num_inference_steps: _Count | None = None
    guidance_scale: _Scale | None = None
    guidance_scale_2: _Scale | None = None
    flow_shift: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    plan: str | None = Field(default=None, description="Name of a plan, or dense; see /v1/models.")
    speedup: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, description="The point of the plan's front with at least this speed-up."
    )
    user: str | None = Field(default=None, description="Not used.")

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _fit(cls, text: str | None) -> str | None:
        if text is not None:
            if not text.strip():
                raise ValueError("must be text that is not empty")
            if why := unfit(text):
                raise ValueError(why)
        return text


class JobRequest(GenerationRequest):
    """The body of POST /v1/images, and what it has in common with that of POST /v1/videos."""

    input_reference: ImageReference | None = Field(
        default=None, description="The image to begin with; in a form, a file."
    )
    compare: bool = Field(default=False, description="Also generate dense, and compare.")


class VideoRequest(JobRequest):
    """The body of POST /v1/videos."""

    seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] | None = Field(
        default=None, description="Length; num_frames goes before it."
    )
    num_frames: _Count | None = None
    fps: Annotated[float, Field(gt=0, le=240, allow_inf_nan=False)] | None = None


class ImageRequest(GenerationRequest):
    """The body of POST /v1/images/generations."""

    n: Annotated[int, Field(ge=1, le=10)] = 1
    response_format: Annotated[str, Field(pattern="^b64_json$")] = "b64_json"


async def read_job_request(request: Request, kind: type[Asked]) -> tuple[Asked, bytes | None]:
    """The fields of a request, and the image that came with it.

    Args:
        request: What came.
        kind: What its body is to be.

    Raises:
        ApiError: If it is neither JSON nor a form, or a field is wrong.
    """
    form = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    upload = None
    if form == "multipart/form-data":
        fields, upload = await _form(request)
    elif form in ("application/json", ""):
        fields = await _json(request)
    else:
        raise ApiError(
            415,
            "unsupported_media_type",
            f"the body must be application/json or multipart/form-data, got {form:.80}",
        )
    try:
        asked = kind.model_validate(fields)
    except ValidationError as error:
        raise invalid_field(error) from None
    if asked.input_reference is not None and upload is None:
        upload = _inline(asked.input_reference.image_url)
    return asked, upload


def fingerprint(fields: BaseModel, upload: bytes | None) -> str:
    """What tells whether two requests are the same."""
    text = fields.model_dump_json().encode()
    return hashlib.sha256(text + b"\0" + (upload or b"")).hexdigest()


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise invalid("the body must be a JSON object") from None


async def _form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a form, of which empty ones count as left out, and its file."""
    fields: dict[str, Any] = {}
    upload = None
    async with request.form(max_files=1, max_fields=MOST_FORM_FIELDS) as form:
        for name, value in form.multi_items():
            if name in fields:
                raise invalid(f"{name}: must be given once", name)
            if isinstance(value, UploadFile):
                if name != "input_reference":
                    raise invalid(f"{name}: is no file", name)
                upload = await value.read()
            elif value != "":
                fields[name] = value
    return _nested(fields), upload


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    """`input_reference[image_url]` of a form as JSON has it."""
    prefix = "input_reference["
    inner = {n[len(prefix) : -1]: fields.pop(n) for n in list(fields) if n.startswith(prefix)}
    return {**fields, "input_reference": inner} if inner else fields


def _inline(url: str) -> bytes:
    """The bytes of a data: URL."""
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise invalid("input_reference: must be a data: URL in base64", "input_reference")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise invalid("input_reference: must be base64", "input_reference") from None
