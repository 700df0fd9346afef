"""What one job generates, as it is kept in the store."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..generation import Case, GenerationSettings, Sampling

Kind = Literal["video", "image"]
AnyKind = Literal["video", "image", "text"]


class JobSpec(BaseModel):
    """A request with every default filled in, so that the same spec gives the same pixels.

    Attributes:
        kind: What comes out.
        prompt, negative_prompt, seed: What is generated; the seed is of the noise.
        width, height: Pixels.
        num_frames: 1 for an image.
        fps: Frames a second of the written file.
        steps: Denoising steps.
        guidance, guidance_2: Guidance scales; the second one is of a pipeline's second transformer.
        flow_shift: Shift of the noise levels; None keeps the scheduler's own.
        max_sequence_length: Text tokens; None keeps the pipeline's own.
        plan: Name of a plan that the server was started with, or `"dense"`.
        speedup: The point of the plan's front that is run; None for the plan as it is.
        compare: Whether the same seed is also generated dense.
        has_input: Whether an image was uploaded with the request.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    prompt: str
    negative_prompt: str | None = None
    seed: int
    width: int
    height: int
    num_frames: int = 1
    fps: float = 8
    steps: int
    guidance: float
    guidance_2: float | None = None
    flow_shift: float | None = None
    max_sequence_length: int | None = None
    plan: str
    speedup: float | None = None
    compare: bool = False
    has_input: bool = False

    @property
    def case(self) -> Case:
        """The prompt with its seed."""
        return Case(self.prompt, self.seed)

    @property
    def settings(self) -> GenerationSettings:
        """Size, steps and guidance."""
        return GenerationSettings(
            self.height,
            self.width,
            self.num_frames,
            steps=self.steps,
            guidance=self.guidance,
            max_sequence_length=self.max_sequence_length,
            negative_prompt=self.negative_prompt,
        )

    @property
    def total_steps(self) -> int:
        """Denoising steps of all generations of the job."""
        return self.steps * (2 if self.compare else 1)

    @property
    def size(self) -> str:
        """How much it is, for the log."""
        return f"{self.width}x{self.height}, {self.num_frames} frames, {self.steps} steps"


class TextSpec(BaseModel):
    """What a job of a diffusion language model writes, so that the same spec gives the same tokens.

    Attributes:
        prompt: What is gone on with.
        prompt_tokens: How many tokens it has.
        seed, temperature, top_p: See `Sampling`.
        max_tokens: Tokens that are written, unless the text ends before.
        block_length: Tokens that are denoised together.
        steps: Steps for a block, at most.
        stop: Texts before the first of which what is written ends.
        plan: Name of a rule or of a plan that the server was started with, or `"dense"`.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["text"] = "text"
    prompt: str
    prompt_tokens: int
    seed: int
    temperature: float = 0.0
    top_p: float | None = None
    max_tokens: int
    block_length: int
    steps: int
    stop: list[str] = []
    plan: str

    @property
    def sampling(self) -> Sampling:
        """How its tokens are drawn."""
        return Sampling(self.temperature, self.top_p, self.seed)

    @property
    def size(self) -> str:
        """How much it is, for the log."""
        return f"{self.max_tokens} tokens after {self.prompt_tokens}"
