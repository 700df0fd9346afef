"""One way to run a diffusion language model, measured beside dense attention on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...making import Making
from ...timing import Pairs, Taken, Timer
from ..rows import Row
from .prompts import Prompt
from .writing import Trajectory, Writing


class Account(Protocol):
    """What a way did, told after it ran."""

    @property
    def pairs(self) -> float: ...
    @property
    def computed(self) -> float: ...
    @property
    def kept_bytes(self) -> int: ...
    def time_making(self) -> Making | None: ...


Way = Callable[[], AbstractContextManager[Account]]


@dataclass(frozen=True, eq=False)
class _Dense:
    """What dense attention wrote, how, and how long it took."""

    tokens: Tensor
    taken: Taken
    trajectory: Trajectory


@dataclass(frozen=True)
class Along:
    """A way's divergence along a trajectory, the seconds it took, and those in which it made indices."""

    divergence: float
    seconds: float
    making: float | None


@contextmanager
def counted_steps(pipe: Any, sizes: list[int]) -> Iterator[None]:
    """Inside the block the length of each forward of the pipeline's model is added to `sizes`."""
    hook = pipe.model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    try:
        yield
    finally:
        hook.remove()


class Measure:
    """Writes after all prompts dense, then in any way in turn with dense.

    Args:
        pipe: Not patched.
        writing: How much is written, in what steps.
        prompts: Texts that go on and questions.
        say: Called with a line of text before each prompt.
    """

    def __init__(
        self, pipe: Any, writing: Writing, prompts: Sequence[Prompt], say: Callable[[str], None]
    ) -> None:
        self.pipe, self.writing, self.prompts = pipe, writing, prompts
        self.dense: list[_Dense] = []
        for prompt in prompts:
            say(f"dense: {prompt.name}")
            trajectory = Trajectory(pipe.mask_token_id, writing.block)
            with trajectory.recorded(pipe):
                tokens, taken = writing.run(pipe, prompt.ids)
            self.dense.append(_Dense(tokens, taken, trajectory))
        sizes = [prompt.ids.shape[1] for prompt in prompts]
        self.cache_bytes = cache_bytes(pipe.model.config, max(sizes) + writing.length)

    def row(self, way: Way) -> Row:
        """The figures of a way: dense and sparse generations in turn, then the trajectories again.

        Of the row, `speedup` is that of whole generations, steps saved or added included; `step_speedup` is
        of the time of a forward. `agreement` is the share of written tokens that are dense's, `kl` the
        divergence of what is said of masked tokens along dense's own trajectory, `kept` the indices' share
        of the memory of a cache of all keys and values, `making` the share of the seconds of the forwards
        along those trajectories in which indices are made, None where that isn't known.
        """
        dense, sparse, same, right, kept = [], [], [], 0, 0
        pairs = computed = 0.0
        steps: tuple[list[int], list[int]] = ([], [])
        for prompt, before in zip(self.prompts, self.dense, strict=True):
            with counted_steps(self.pipe, steps[0]):
                dense.append(self.writing.run(self.pipe, prompt.ids)[1])
            with way() as account, counted_steps(self.pipe, steps[1]):
                tokens, taken = self.writing.run(self.pipe, prompt.ids)
                kept = max(kept, account.kept_bytes)  # until the way ends
            sparse.append(taken)
            pairs, computed = pairs + account.pairs, computed + account.computed
            same.append((tokens == before.tokens).float().mean().item())
            right += self._is_right(prompt, tokens)
        along = [along_dense(before.trajectory, self.pipe, way) for before in self.dense]
        making = [one.making for one in along if one.making is not None]
        of_all = sum(one.seconds for one in along)
        timed = Pairs(dense, sparse)
        per_step = timed.speedup * len(steps[1]) / max(1, len(steps[0]))
        return {
            "density": round(computed / max(1.0, pairs), 5),
            "speedup": round(timed.speedup, 4),
            "step_speedup": round(per_step, 4),
            "caution": timed.caution,
            "seconds": round(sum(t.seconds for t in sparse), 3),
            "dense_seconds": round(sum(t.seconds for t in dense), 3),
            "steps": len(steps[1]),
            "dense_steps": len(steps[0]),
            "kl": round(sum(one.divergence for one in along) / len(along), 6),
            "agreement": round(sum(same) / len(same), 5),
            "agreement_least": round(min(same), 5),
            "passkeys": right,
            "dense_passkeys": self.dense_right,
            "asked": sum(prompt.answer is not None for prompt in self.prompts),
            "kept": round(kept / self.cache_bytes, 6),
            "making": round(sum(making) / of_all, 5) if making else None,
        }

    @property
    def dense_right(self) -> int:
        """Questions that dense attention answers."""
        pairs = zip(self.prompts, self.dense, strict=True)
        return sum(self._is_right(prompt, before.tokens) for prompt, before in pairs)

    def _is_right(self, prompt: Prompt, tokens: Tensor) -> bool:
        said = self.pipe.tokenizer.decode(tokens, skip_special_tokens=True)
        return prompt.answer is not None and prompt.answer in said


def along_dense(trajectory: Trajectory, pipe: Any, way: Way) -> Along:
    """What a way makes of a trajectory of dense attention."""
    with way() as account:
        making, timer = account.time_making(), Timer(pipe.model.device)
        divergence = trajectory.divergence(pipe)
        seconds = timer.stop().seconds
        if making is None:
            return Along(divergence, seconds, None)
        return Along(divergence, max(1e-9, seconds - making.seconds_again), making.seconds)


def cache_bytes(config: Any, tokens: int) -> int:
    """Memory of all keys and values of so many tokens, in the model's dtype."""
    text = config.get_text_config()
    heads = text.num_key_value_heads or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = torch.empty(0, dtype=text.dtype or torch.float32).element_size()
    return 2 * text.num_hidden_layers * heads * width * tokens * size
