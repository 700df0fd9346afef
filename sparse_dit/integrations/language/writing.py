"""Diffusion language models that are run: a pipeline from a folder, and what it writes after a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.llada2.pipeline_llada2 import LLaDA2Pipeline
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementScheduler
from torch import Tensor
from transformers import AutoTokenizer

from ...timing import Taken, Timer
from ..loading import load as load_pipeline
from ..pipeline import progress_bars_off
from .loading import load


@dataclass(frozen=True)
class Writing:
    """How a pipeline like `LLaDA2Pipeline` writes: how much, in what blocks, in how many steps a block.

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
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def check(self, pipe: Any, tokens: int) -> None:
        """Raise ValueError unless a prompt of so many tokens, and what follows it, fit into the model."""
        if tokens < 1:
            raise ValueError("a prompt must have at least one token, got an empty one")
        most = getattr(pipe.model.config, "max_position_embeddings", None)
        total = -(-(tokens + self.length) // self.block) * self.block
        if most is not None and total > most:
            raise ValueError(
                f"prompt and answer must fit into the model's {most} tokens, got {total}; give fewer"
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
        options: dict[str, Any] = {}
        if after_step is not None:
            options["callback_on_step_end"] = _step_end(after_step)
        with progress_bars_off(pipe):
            timer = Timer(pipe.model.device)
            found = pipe(
                input_ids=ids, gen_length=self.length, block_length=self.block,
                num_inference_steps=self.steps, temperature=0.0, output_type="seq",
                eos_early_stop=False, **options,
            )  # fmt: skip
            taken = timer.stop()
        return found.sequences[0].cpu(), taken


@dataclass(eq=False)
class Trajectory:
    """The forwards of a generation: what each was given, and what it said of the tokens being denoised.

    Args:
        given: The arguments of each forward.
        places: Of each, int64 `[P]`: the masked tokens that are denoised.
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
        model, tokenizer = load(name, dtype)
        if getattr(model.config.get_text_config(), "is_causal", None) is not False:
            raise ValueError(
                f"{name} is a causal language model; the config of one that denoises says is_causal: false"
            )
        pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(), tokenizer)
        pipe.mask_token_id = tokenizer.mask_token_id or getattr(model.config, "mask_token_id", None)
    if not isinstance(pipe, LLaDA2Pipeline):
        raise ValueError(f"{name} must be a LLaDA2Pipeline, got a {type(pipe).__name__}")
    if pipe.mask_token_id is None:
        raise ValueError(f"{name} must say what its mask token is: its tokenizer has none")
    pipe.model.eval()
    return pipe


def _step_end(after_step: Callable[[Tensor], None]) -> Callable[..., dict[str, Any]]:
    def step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after_step(tensors["block_x"][0].cpu())
        return {}

    return step_end
