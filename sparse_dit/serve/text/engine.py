"""A loaded diffusion language model that writes what jobs ask for, by another rule for each if need be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...denoising import DENOISING, denoising_plan
from ...inputs import load_denoiser
from ...integrations import host_of
from ...patch import patch
from ...plan import Plan
from ..plans import Plans, Served, load_plans
from ..spec import TextSpec


class Enough(Exception):
    """What is to be written is written."""


@dataclass(frozen=True)
class Written:
    """What came of a job.

    Args:
        tokens: Ids, `max_tokens` of them; None if it was ended by `Enough`.
        summary: What ran sparse, what ran dense and why; None without a plan.
    """

    tokens: list[int] | None
    summary: dict[str, Any] | None


@dataclass(frozen=True)
class TextEngine:
    """A pipeline in this process, and the rules and plans that it may run with.

    Args:
        pipe: As `load_denoiser` gives it.
        plans: What requests may name.
    """

    pipe: Any
    plans: Plans

    def write(
        self, spec: TextSpec, plan: Plan | None, after_step: Callable[[Tensor], None]
    ) -> Written:
        """Write once.

        Args:
            spec: What to go on with, and how far.
            plan: What attention computes; None for stock attention.
            after_step: Called after each step with all tokens up to the block's end, int64 `[M]`.

        Raises:
            ValueError: If the pipeline can't do what is asked.
        """
        ids = torch.tensor([ids_of(self.pipe, spec.prompt)])
        tokens = None
        with nullcontext() if plan is None else patch(self.pipe, plan) as handle:
            try:
                found, _ = host_of(self.pipe).write(
                    self.pipe,
                    ids.to(self.pipe.model.device),
                    length=spec.max_tokens,
                    block=spec.block_length,
                    steps=spec.steps,
                    after_step=after_step,
                    sampling=spec.sampling,
                    ends=True,
                )
                tokens = found.tolist()
            except Enough:
                pass
            return Written(tokens, None if handle is None else handle.summary().to_dict())


def load_text_engine(
    model: str, dtype: str | None, plans: Sequence[str], device: str
) -> TextEngine:
    """The pipeline on a device, with its rules and plans; for the arguments see `load_engine`."""
    pipe = load_denoiser(model, device, dtype)
    return TextEngine(pipe, text_plans(pipe, plans))


def text_plans(pipe: Any, names: Sequence[str]) -> Plans:
    """Plans from files, and the rules that need none, by the names that requests give.

    Args:
        pipe: The pipeline, which needs no weights for it.
        names: See `load_plans`.

    Raises:
        ValueError: If a plan can't be read, or is called as a rule or another plan is.
        NotImplementedError: If the model is no diffusion language model.
    """
    files = load_plans(names)
    if taken := sorted({*files} & {*DENOISING}):
        raise ValueError(f"--plan: {taken[0]} is the name of a rule: rename the file")
    rules = [Served(name, denoising_plan(pipe, name), None) for name in DENOISING]
    return Plans([*files.values(), *rules])


def ids_of(pipe: Any, text: str) -> list[int]:
    """The tokens of a prompt."""
    return list(pipe.tokenizer(text).input_ids)
