"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...generation import MAX_SEED

MOST_STOPS = 4
MOST_STOP = 256  # characters
_Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP)]
_Count = Annotated[int, Field(ge=1, le=1 << 16)]


class StreamOptions(BaseModel):
    """What comes in a stream beside the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = Field(default=False, description="A last chunk that counts tokens.")
    include_canvas: bool = Field(
        default=False,
        description="A chunk for each step with `canvas`: all tokens, null where none is written yet.",
    )


class CompletionRequest(BaseModel):
    """A text that is to be gone on with."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] = Field(
        description="A text, or a list of one."
    )
    model: str | None = Field(default=None, description="Name of the model; see /v1/models.")
    max_tokens: _Count | None = Field(default=None, description="Tokens that are written.")
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = Field(
        default=0.0, description="0 writes the most likely tokens."
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="Of what is drawn; drawn at random if left out."
    )
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = Field(
        default=None, description="Texts before which what is written ends."
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    plan: str | None = Field(
        default=None, description="Name of a rule or plan, or dense; see /v1/models."
    )
    block_length: _Count | None = Field(
        default=None, description="Tokens that are denoised together."
    )
    num_inference_steps: _Count | None = Field(
        default=None, description="Steps for a block, at most."
    )
    n: Literal[1] = 1
    user: str | None = Field(default=None, description="Not used.")

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, prompt: Any) -> Any:
        texts = prompt if isinstance(prompt, list) else [prompt]
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise ValueError("must be a text, or a list of one text")
        if not texts[0].strip():
            raise ValueError("must be text that is not empty")
        return prompt

    @field_validator("stop", mode="before")
    @classmethod
    def _some(cls, stop: Any) -> Any:
        texts = [] if stop is None else stop if isinstance(stop, list) else [stop]
        fits = all(isinstance(text, str) and 0 < len(text) <= MOST_STOP for text in texts)
        if not fits or len(texts) > MOST_STOPS:
            raise ValueError(
                f"must be up to {MOST_STOPS} texts of 1 to {MOST_STOP} characters each"
            )
        return stop

    @model_validator(mode="after")
    def _whole(self) -> CompletionRequest:
        try:
            self.model_dump_json()
        except ValueError:
            raise ValueError("all of it must be text, got half of a surrogate pair") from None
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def stops(self) -> list[str]:
        """The texts before which what is written ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []
