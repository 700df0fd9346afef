"""Diffusion language models that are run: a pipeline from a folder, and what it writes after a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.llada2.pipeline_llada2 import LLaDA2Pipeline
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementScheduler
from torch import Tensor
from transformers import AutoTokenizer

from ...generation import Sampling
from ...timing import Taken, Timer
from ..loading import load as load_pipeline
from ..pipeline import progress_bars_off
from .loading import load, outline


def write(
    pipe: Any,
    ids: Tensor,
    *,
    length: int,
    block: int,
    steps: int,
    after_step: Callable[[Tensor], None] | None = None,
    sampling: Sampling | None = None,
    ends: bool = False,
) -> tuple[Tensor, Taken]:
    """What a `LLaDA2Pipeline` writes after a prompt, int64 `[length]` on the CPU, and how long it took.

    Args:
        pipe: The pipeline.
        ids: int64 `[1, N]`.
        length: Tokens that are written.
        block: Tokens that are denoised together.
        steps: Steps for a block, at most.
        after_step: Called after each step with all tokens up to the block's end, int64 `[M]`. What it raises
            ends the generation.
        sampling: How tokens are drawn; None takes the most likely ones.
        ends: Whether the block in which the end of the text is written is the last one.
    """
    sampling, device = sampling or Sampling(), pipe.model.device
    options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.temperature > 0:
        options["generator"] = torch.Generator(device).manual_seed(sampling.seed)
    if after_step is not None:
        options["callback_on_step_end"] = _step_end(after_step)
    with progress_bars_off(pipe):
        timer = Timer(device)
        found = pipe(
            input_ids=ids, gen_length=length, block_length=block, num_inference_steps=steps,
            output_type="seq", eos_early_stop=ends, **options,
        )  # fmt: skip
        taken = timer.stop()
    return found.sequences[0].cpu(), taken


def load_denoiser(name: str, dtype: torch.dtype) -> Any:
    """A pipeline that writes by denoising, with its tokenizer: saved as one, or made around a model that is.

    Args:
        name: A folder or hub id: of a `LLaDA2Pipeline`, or of a model of transformers whose config says
            `is_causal: false`.
        dtype: Of its weights.

    Raises:
        ValueError: If it can't be read, or is of another kind.
    """
    if (Path(name) / "model_index.json").is_file():
        try:
            pipe: Any = load_pipeline(name, dtype)
            if not callable(
                getattr(pipe, "tokenizer", None)
            ):  # its class isn't in model_index.json
                pipe.tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer")
                pipe.eos_token_id = pipe.tokenizer.eos_token_id
                pipe.mask_token_id = pipe.tokenizer.mask_token_id
        except (OSError, KeyError, AttributeError) as error:
            raise ValueError(f"{name} can't be read: {error}") from None
    else:
        pipe = _around(name, *load(name, dtype))
    if not isinstance(pipe, LLaDA2Pipeline):
        raise ValueError(f"{name} must be a LLaDA2Pipeline, got a {type(pipe).__name__}")
    _check_mask(name, pipe)
    pipe.model.eval()
    return pipe


def outline_denoiser(name: str, dtype: torch.dtype) -> Any:
    """The pipeline that `load_denoiser` gives, with its tokenizer and without weights: it can't write.

    Args:
        name: A folder or hub id, of which only small files are read.
        dtype: Of the weights that it would have.

    Raises:
        ValueError: If it can't be read, or is of another kind.
    """
    whole = (Path(name) / "model_index.json").is_file()
    pipe = _around(name, *outline(name, dtype, *(("model", "tokenizer") if whole else ("", ""))))
    _check_mask(name, pipe)
    return pipe


def _around(name: str, model: Any, tokenizer: Any) -> Any:
    """A pipeline made around a model that sees both ways."""
    if getattr(model.config.get_text_config(), "is_causal", None) is not False:
        raise ValueError(
            f"{name} is a causal language model; the config of one that denoises says is_causal: false"
        )
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(), tokenizer)
    pipe.mask_token_id = tokenizer.mask_token_id or getattr(model.config, "mask_token_id", None)
    return pipe


def _check_mask(name: str, pipe: Any) -> None:
    if pipe.mask_token_id is None:
        raise ValueError(f"{name} must say what its mask token is: its tokenizer has none")


def _step_end(after_step: Callable[[Tensor], None]) -> Callable[..., dict[str, Any]]:
    def step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after_step(tensors["block_x"][0].cpu())
        return {}

    return step_end
