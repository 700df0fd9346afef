"""What a diffusion language model writes, and the steps by which it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...denoising import canvas_length
from ...integrations import host_of
from ...timing import Taken
from ...words import option

CANVAS_STEPS = 48  # for a canvas beside a cache: what DiffusionGemma's pipeline takes


def context_of(pipe: Any) -> int | None:
    """Tokens that a prompt and what follows it may have together; None if the model doesn't say."""
    return getattr(pipe.model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Writing:
    """How a pipeline that writes by denoising does it: how much, in what blocks, in how many steps a block.

    Tokens are the most likely ones. The rest is the pipeline's own: it writes what it is sure of at once, and
    may change what it wrote.

    Args:
        length: Tokens that are written.
        block: Tokens that are denoised together.
        steps: Steps for a block, at most.

    Raises:
        ValueError: If one of them isn't at least 1.
    """

    length: int = 64
    block: int = 32
    steps: int = 16

    def __post_init__(self) -> None:
        for name in ("length", "block", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{option(name)} must be at least 1, got {getattr(self, name)}")

    def check(self, pipe: Any, tokens: int) -> None:
        """Raise ValueError unless a prompt of so many tokens, and what follows it, fit into the model.

        Args:
            pipe: The pipeline; it needs no weights.
            tokens: Tokens of the prompt.
        """
        if tokens < 1:
            raise ValueError("a prompt must have at least one token, got an empty one")
        canvas, most = canvas_length(pipe.model), context_of(pipe)
        if canvas not in (None, self.block):
            raise ValueError(
                f"a block must be the model's canvas of {canvas} tokens, got {self.block}"
            )
        if canvas is None:  # blocks begin with the prompt
            total = self.block * math.ceil((tokens + self.length) / self.block)
        else:
            total = tokens + self.block * math.ceil(self.length / self.block)
        if most is not None and total > most:
            raise ValueError(
                f"prompt and answer must fit into the model's {most} tokens, got {total} in whole blocks of "
                f"{self.block}; give fewer"
            )

    def run(
        self, pipe: Any, ids: Tensor, after_step: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Taken]:
        """What a pipeline writes after a prompt, int64 `[length]` on the CPU, and how long it took.

        Args:
            pipe: The pipeline.
            ids: int64 `[1, N]`.
            after_step: Called after each step with all tokens up to the block's end, int64 `[M]`.

        Raises:
            ValueError: See `check`.
        """
        self.check(pipe, ids.shape[1])
        return host_of(pipe).write(pipe, ids, **vars(self), after_step=after_step)


@dataclass(eq=False)
class Trajectory:
    """The forwards of a generation: what each was given, and what it said of the tokens being denoised.

    Args:
        given: The arguments of each forward.
        places: For each, int64 `[P]`: the masked tokens that are denoised.
        said: float32 `[P, V]` of each: log-probabilities.
    """

    mask_token: int
    block: int
    given: list[dict[str, Any]] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)

    @contextmanager
    def recorded(self, pipe: Any) -> Iterator[None]:
        """Inside the block, forwards of the pipeline's model are added."""

        def after(_: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            ids = args[0]
            masked = (ids[0, -self.block :] == self.mask_token).nonzero()[:, 0]
            if not len(masked):  # nothing is left but to change what stands
                return
            self.given.append({"input_ids": ids.clone(), **kwargs})
            self.places.append(masked + ids.shape[1] - self.block)
            self.said.append(out.logits[0, self.places[-1]].float().log_softmax(-1).cpu())

        hook = pipe.model.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def divergence(self, pipe: Any) -> float:
        """Mean KL divergence of what the model says now from what it said, in nats a masked token."""
        total, count = 0.0, 0
        for given, places, told in zip(self.given, self.places, self.said, strict=True):
            says = pipe.model(**given).logits[0, places].float().log_softmax(-1).cpu()
            total += float((told.exp() * (told - says)).sum())
            count += len(places)
        return total / max(1, count)
