"""Where a forward of a diffusion language model stands: which generation, which step, how much is masked.

A masked model is told by its tokens alone: a forward belongs to the generation whose prompt it begins with
and whose masks it has, or fewer. So generations that take turns, or run in threads, aren't taken for each
other, and one that begins again is a new one, also where it writes what another has written. A model whose
decoder reads a cache is told by the cache.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ...call import StepContext
from ...layout import Segment, TokenLayout

MOST_KNOWN = 8  # generations that may take turns
STEPS = 48  # DiffusionGemma's default


@dataclass(eq=False)
class _Generation:
    """A generation of a masked model, as of its last forward.

    Args:
        run: Its number.
        prompt: Tokens before the first masked one.
        ids: int64 `[B, N]`, on the CPU.
        masked: Bool `[B, N]`.
        active: Tokens from here on are denoised at present.
        most: For each item the masked tokens among them when they first came, at least 1: int64 `[B]`.
        thread: Where that was.
        step: Forwards before this one.
    """

    run: int
    prompt: int
    ids: Tensor
    masked: Tensor
    active: int
    most: Tensor
    thread: int
    step: int = 0

    def fit(self, ids: Tensor, masked: Tensor) -> tuple[int, bool, bool] | None:
        """How well ids go on with this generation, greater is better; None if they are of another one.

        Few written tokens change; a generation that has ended may stand where these ids do, but what goes on
        has written more; and it mostly stays in its thread.
        """
        batch, before = self.ids.shape
        if len(ids) != batch or ids.shape[1] < before or not masked[:, before:].all():
            return None
        old, fresh = ids[:, :before], self.masked & ~masked[:, :before]
        if (masked[:, :before] & ~self.masked).any():
            return None
        if not torch.equal(old[:, : self.prompt], self.ids[:, : self.prompt]):
            return None
        if self.prompt == 0 and 2 * int(fresh.sum()) > fresh.numel():  # a prompt, not an answer
            return None
        stands = torch.equal(ids, self.ids)
        if stands and self.step == 0:  # begun again
            return None
        written = ~self.masked
        changed = int((old != self.ids)[written].sum())
        if 2 * changed > int(written.sum()):
            return None
        return -changed, not stands, self.thread == threading.get_ident()

    def advance(self, ids: Tensor, masked: Tensor) -> None:
        """Take the next forward's tokens over."""
        if ids.shape[1] > self.ids.shape[1]:
            self.active, self.most = _first_masked(masked, self.prompt), _count(masked, self.prompt)
        self.ids, self.masked, self.step = ids, masked, self.step + 1
        self.thread = threading.get_ident()

    def context(self) -> StepContext:
        """Where its last forward stands."""
        left = self.masked[:, self.active :].sum(1)
        length = self.ids.shape[1]
        return StepContext(
            _layout(self.prompt, length - self.prompt),
            float((left / self.most).max().clamp(0, 1)),
            run=self.run,
            step=self.step,
            active=length - self.active,
        )


@dataclass(eq=False)
class _Cached:
    """A generation whose decoder reads a cache: its number, the cache's length, and steps at that length."""

    run: int
    length: int
    step: int = -1
    first: int = 0

    def context(self, steps: int) -> StepContext:
        """Where its last forward stands; its layout follows from each call."""
        share = (self.step - self.first) / steps
        return StepContext(None, max(0.0, 1 - share), run=self.run, step=self.step, active=1)


class Canvases:
    """What the hooks of one diffusion language model saw, and what follows for the present forward.

    Args:
        mask_token: Id of the token that stands for what isn't written yet; None if it is to be learned: it is
            the last one of a generation's first forward.
        cached: Whether canvases lie beside a cache instead, and have no mask token.
        steps: In how many a canvas beside a cache is denoised, unless the scheduler of `pipe` tells.
        pipe: The pipeline, if one is known.
    """

    def __init__(
        self, mask_token: int | None, cached: bool = False, steps: int = STEPS, pipe: Any = None
    ) -> None:
        self.mask_token = mask_token
        self.cached = cached
        self.steps = steps
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._lock = threading.Lock()
        self._number = -1
        self._known: list[_Generation] = []  # the one that ran last is the last
        self._cached: weakref.WeakKeyDictionary[Cache, _Cached] = weakref.WeakKeyDictionary()
        self._here = threading.local()

    def __reduce__(self):
        return Canvases, (self.mask_token, self.cached, self.steps)

    @staticmethod
    def of(model: nn.Module, pipe: Any) -> Canvases | None:
        """For a model, or its pipeline, that says what its mask token is or that it has canvases."""
        if not any(sees_both_ways(module) for module in model.modules()):
            return None
        config: Any = model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        token = getattr(pipe, "mask_token_id", None)
        token = getattr(text, "mask_token_id", None) if token is None else token
        if getattr(config, "canvas_length", None) is not None:
            settings = getattr(model, "generation_config", None)
            steps = getattr(settings, "max_denoising_steps", None) or STEPS
            return Canvases(None, True, steps, pipe if pipe is not model else None)
        if token is None and not hasattr(pipe, "mask_token_id"):
            return None
        return Canvases(token)

    def watch(self, model: nn.Module, layers: list[str]) -> list[Any]:
        """Set a hook on the module that holds the layers that see both ways; return its handle.

        Args:
            model: The model.
            layers: Their paths in it.
        """
        holder = layers[0].rpartition(".layers.")[0]
        root = model.get_submodule(holder) if self.cached else model
        return [root.register_forward_pre_hook(self._before, with_kwargs=True)]

    def stand(self, n: int, m: int) -> StepContext | None:
        """Where a call of n queries and m keys in this thread's forward stands; None if it isn't known."""
        now: StepContext | None = getattr(self._here, "now", None)
        if now is None or now.layout is not None:
            return now
        known: dict[tuple[int, int], StepContext] = self._here.places
        if (n, m) not in known:
            known[n, m] = replace(now, layout=_layout(m - n, n), active=n)
        return known[n, m]

    def _before(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._here.now, self._here.places = None, {}
        if self.cached:
            if isinstance(cache := kwargs.get("past_key_values"), Cache):
                self._here.now = self._of_cache(cache)
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel():
            self._here.now = self._of_tokens(
                ids.detach().to("cpu", copy=True)
            )  # written over later

    def _of_cache(self, cache: Cache) -> StepContext:
        with self._lock:
            length, known = cache.get_seq_length(), self._cached.get(cache)
            if known is None or length < known.length:
                self._number += 1
                known = self._cached[cache] = _Cached(self._number, length)
            known.step += 1
            if length != known.length:
                known.length, known.first = length, known.step
            scheduler = getattr(None if self._pipe is None else self._pipe(), "scheduler", None)
            return known.context(_forwards(scheduler) or self.steps)

    def _of_tokens(self, ids: Tensor) -> StepContext:
        with self._lock:
            if self.mask_token is None:
                self.mask_token = int(ids[0, -1])
            masked = ids == self.mask_token
            fits = [(fit, one) for one in reversed(self._known) if (fit := one.fit(ids, masked))]
            _, found = max(fits, key=lambda each: each[0], default=(None, None))
            if found is None:
                self._number += 1
                prompt = _first_masked(masked, 0, latest=True)
                most, thread = _count(masked, prompt), threading.get_ident()
                found = _Generation(self._number, prompt, ids, masked, prompt, most, thread)
            else:
                self._known.remove(found)
                found.advance(ids, masked)
            self._known = [*self._known[1 - MOST_KNOWN :], found]
            return found.context()


def sees_both_ways(module: Any) -> bool:
    """Whether an attention layer sees later tokens, by its config or its class."""
    if getattr(module, "layer_idx", None) is None:
        return False
    said = getattr(getattr(module, "config", None), "is_causal", None)
    return said is False or getattr(module, "is_causal", True) is False


def _forwards(scheduler: Any) -> int:
    """In how many forwards a scheduler's steps denoise a canvas, at most; 0 if it doesn't say.

    Those of `corrector_steps` come after the first steps; the pipeline takes them off their number.
    """
    steps = getattr(scheduler, "num_inference_steps", None) or 0
    more = getattr(getattr(scheduler, "config", None), "corrector_steps", None) or 0
    return steps + max(0, steps - 1) * more


def _layout(before: int, length: int) -> TokenLayout:
    """Two segments, or one: what is read, and what is written."""
    return TokenLayout(tuple(Segment.grid(1, 1, n) for n in (before, length) if n))


def _first_masked(masked: Tensor, start: int, latest: bool = False) -> int:
    """The first masked token from `start` on, of the items with some; the latest or the earliest of them."""
    part = masked[:, start:]
    some = part.any(1)
    if not some.any():
        return masked.shape[1]
    first = part[some].int().argmax(1)
    return start + int(first.max() if latest else first.min())


def _count(masked: Tensor, start: int) -> Tensor:
    return masked[:, start:].sum(1).clamp_min(1)
