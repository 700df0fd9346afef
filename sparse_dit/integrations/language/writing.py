"""Diffusion language models that are run: a pipeline from a folder, and what it writes after a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.diffusion_gemma.pipeline_diffusion_gemma import DiffusionGemmaPipeline
from diffusers.pipelines.llada2.pipeline_llada2 import LLaDA2Pipeline
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementScheduler
from torch import Tensor
from transformers import AutoTokenizer

from ...generation import Sampling
from ...timing import Taken, Timer
from ..loading import load as load_pipeline
from ..pipeline import progress_bars_off
from .beside_cache import write_canvases
from .finite import numbers_only
from .loading import load, outline

# where a `DiffusionGemmaPipeline` has its model and its tokenizer
IN_PARTS = ("model", "processor")


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
    """What a pipeline writes after a prompt, int64 `[length]` on the CPU, and how long it took.

    Args:
        pipe: As `load_denoiser` gives it.
        ids: int64 `[1, N]`.
        length: Tokens that are written.
        block: Tokens that are denoised together; DiffusionGemma's canvas has its own length.
        steps: Steps for a block, at most.
        after_step: Called after each step with all tokens up to the block's end, int64 `[M]`. What it raises
            ends the generation.
        sampling: How tokens are drawn; None takes the most likely ones. DiffusionGemma takes no `top_p`.
        ends: Whether the block in which the end of the text is written is the last one.

    Raises:
        ValueError: If what the model says of tokens is NaN.
    """
    sampling, device = sampling or Sampling(), pipe.model.device
    if isinstance(pipe, DiffusionGemmaPipeline):
        told = {"after_step": after_step, "sampling": sampling, "ends": ends}
        return write_canvases(pipe, ids, length=length, steps=steps, **told)
    options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.temperature > 0:
        options["generator"] = torch.Generator(device).manual_seed(sampling.seed)
    if after_step is not None:
        options["callback_on_step_end"] = _step_end(after_step)
    with progress_bars_off(pipe), numbers_only(pipe.model):
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
        name: A folder or hub id: of a `LLaDA2Pipeline` or `DiffusionGemmaPipeline`, or of a model of
            transformers whose config says `is_causal: false` or how long its canvas is.
        dtype: The dtype of its weights.

    Returns:
        The pipeline; its `mask_token_id` is None where a canvas has random tokens in place of masked ones.

    Raises:
        ValueError: If it can't be read, or is of another kind.
    """
    if (Path(name) / "processor").is_dir():  # diffusers takes the model for a class of its own
        pipe: Any = _around(name, *load(name, dtype, *IN_PARTS))
        pipe.register_modules(scheduler=_scheduler(name))
    elif (Path(name) / "model_index.json").is_file():
        try:
            pipe = load_pipeline(name, dtype)
            if not callable(getattr(pipe, "tokenizer", None)):
                # its class isn't in model_index.json
                pipe.tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer")
                pipe.eos_token_id = pipe.tokenizer.eos_token_id
                pipe.mask_token_id = pipe.tokenizer.mask_token_id
        except (OSError, KeyError, AttributeError) as error:
            raise ValueError(f"{name} can't be read: {error}") from None
    else:
        pipe = _around(name, *load(name, dtype))
    if not isinstance(pipe, LLaDA2Pipeline | DiffusionGemmaPipeline):
        raise ValueError(
            f"{name} must be a LLaDA2Pipeline or DiffusionGemmaPipeline, got a {type(pipe).__name__}"
        )
    _check_mask(name, pipe)
    pipe.model.eval()
    return pipe


def outline_denoiser(name: str, dtype: torch.dtype) -> Any:
    """The pipeline that `load_denoiser` gives, with its tokenizer and without weights: it can't write.

    Args:
        name: A folder or hub id, of which only small files are read.
        dtype: The dtype that its weights would have.

    Raises:
        ValueError: If it can't be read, or is of another kind.
    """
    parts = ("", "")
    if (Path(name) / "model_index.json").is_file():
        processor = (Path(name) / "processor").is_dir()
        parts = IN_PARTS if processor else ("model", "tokenizer")
    pipe = _around(name, *outline(name, dtype, *parts))
    _check_mask(name, pipe)
    return pipe


def _around(name: str, model: Any, tokenizer: Any) -> Any:
    """A pipeline made around a model that sees both ways."""
    if getattr(model.config, "canvas_length", None) is not None:
        pipe: Any = DiffusionGemmaPipeline(model, BlockRefinementScheduler(), tokenizer)
        _tell_tokenizer(pipe, tokenizer)
        return pipe
    if getattr(model.config.get_text_config(), "is_causal", None) is not False:
        raise ValueError(
            f"{name} is a causal language model; the config of one that denoises says is_causal: false"
        )
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(), tokenizer)
    pipe.mask_token_id = tokenizer.mask_token_id or getattr(model.config, "mask_token_id", None)
    return pipe


def _scheduler(name: str) -> Any:
    """The scheduler of a `DiffusionGemmaPipeline`'s folder."""
    config: Any = BlockRefinementScheduler.load_config(name, subfolder="scheduler")
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _tell_tokenizer(pipe: Any, tokenizer: Any) -> None:
    """Give DiffusionGemma's pipeline what the others have."""
    pipe.tokenizer, pipe.eos_token_id, pipe.mask_token_id = tokenizer, tokenizer.eos_token_id, None


def _check_mask(name: str, pipe: Any) -> None:
    if pipe.mask_token_id is None and isinstance(pipe, LLaDA2Pipeline):
        raise ValueError(f"{name} must say what its mask token is: its tokenizer has none")


def _step_end(after_step: Callable[[Tensor], None]) -> Callable[..., dict[str, Any]]:
    def step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after_step(tensors["block_x"][0].cpu())
        return {}

    return step_end
