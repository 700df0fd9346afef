"""DiffusionGemma's pipeline, run from tokens: it denoises canvas after canvas beside a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.diffusion_gemma.pipeline_diffusion_gemma import DiffusionGemmaPipeline
from torch import Tensor, nn

from ...generation import Sampling
from ...timing import Taken, Timer
from .finite import numbers_only


class _Prompted:
    """In a processor's place: a prompt of these tokens, whatever is asked.

    Args:
        ids: int64 `[1, N]`.
    """

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def apply_chat_template(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """The tokens."""
        return {"input_ids": self._ids}


def write_canvases(
    pipe: DiffusionGemmaPipeline,
    ids: Tensor,
    *,
    length: int,
    steps: int,
    after_step: Callable[[Tensor], None] | None,
    sampling: Sampling,
    ends: bool,
) -> tuple[Tensor, Taken]:
    """As `writing.write`. A canvas has the model's own length, and is full of random tokens at first."""
    twin: Any = DiffusionGemmaPipeline(pipe.model, pipe.scheduler, _Prompted(ids))
    twin.set_progress_bar_config(disable=True)
    device, read, options = pipe.model.device, [], {}

    def reads(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        read.append(kwargs["input_ids"])  # the prompt, then each canvas as it was finished

    if after_step is not None:

        def step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            after_step(torch.cat([*read, tensors["canvas"]], 1)[0].cpu())
            return {}

        options["callback_on_step_end"] = step_end
    hook = pipe.model.model.encoder.register_forward_pre_hook(reads, with_kwargs=True)
    try:
        with numbers_only(pipe.model):
            timer = Timer(device)
            found = twin(
                prompt="", gen_length=length, num_inference_steps=steps, output_type="seq",
                temperature=sampling.temperature, eos_early_stop=ends, eos_token_id=pipe.eos_token_id,
                generator=torch.Generator(device).manual_seed(sampling.seed), **options,
            )  # fmt: skip
            taken = timer.stop()
    finally:
        hook.remove()
    return found.sequences[0, :length].cpu(), taken
