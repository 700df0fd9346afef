"""What a server of a diffusion language model serves, and what a request comes to with it."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

from ...denoising import canvas_length
from ...eval.denoising.writing import Writing, context_of
from ..errors import invalid
from ..options import Limits
from ..plans import Plans
from ..spec import TextSpec
from .engine import ids_of
from .requests import CompletionRequest

SEEDS = 1 << 31


@dataclass(frozen=True)
class TextCard:
    """What is known of a model without its weights.

    Attributes:
        name: What requests call it.
        plans: Plans and rules; the first is what a request gets that names none.
        writing: How much is written, in what blocks and steps, where a request leaves it out.
        outline: The pipeline without weights, whose tokenizer counts.
    """

    name: str
    plans: Plans
    writing: Writing
    outline: Any
    kind: Literal["text"] = "text"
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def default_plan(self) -> str:
        """What a request gets that names none."""
        return self.plans.names[0]

    @property
    def context(self) -> int | None:
        """Tokens that prompt and text may have together; None if the model doesn't say."""
        return context_of(self.outline)

    def spec_of(self, asked: CompletionRequest, has_input: bool, limits: Limits) -> TextSpec:
        """A request with every default filled in.

        Raises:
            ApiError: If the model can't do it, or it is more than may be.
        """
        del has_input  # there is none
        if asked.model not in (None, self.name):
            raise invalid(f"model must be {self.name}, got {asked.model!r:.80}", "model")
        if len(asked.text) > limits.prompt:
            raise invalid(f"prompt must have at most {limits.prompt:,} characters", "prompt")
        writing = Writing(
            asked.max_tokens or self.writing.length,
            asked.block_length or self.writing.block,
            asked.num_inference_steps or self.writing.steps,
        )
        canvas = canvas_length(self.outline.model)
        if canvas not in (None, writing.block):
            raise invalid(
                f"block_length must be the model's canvas of {canvas} tokens, got {writing.block}",
                "block_length",
            )
        if canvas is not None and asked.top_p is not None:
            raise invalid(f"top_p must be left out: {self.name}'s pipeline takes none", "top_p")
        if writing.steps > limits.steps:
            raise invalid(
                f"num_inference_steps must be at most {limits.steps:,} steps, got {writing.steps:,}",
                "num_inference_steps",
            )
        with self._lock:
            tokens = len(ids_of(self.outline, asked.text))
        try:
            writing.check(self.outline, tokens)
        except ValueError as error:
            raise invalid(str(error), "prompt") from None
        plan = self.default_plan if asked.plan is None else asked.plan
        try:
            self.plans.named(plan, None)
        except ValueError as error:
            raise invalid(str(error), "plan") from None
        return TextSpec(
            prompt=asked.text,
            prompt_tokens=tokens,
            seed=secrets.randbelow(SEEDS) if asked.seed is None else asked.seed,
            temperature=asked.temperature,
            top_p=asked.top_p,
            max_tokens=writing.length,
            block_length=writing.block,
            steps=writing.steps,
            stop=asked.stops,
            plan=plan,
        )
