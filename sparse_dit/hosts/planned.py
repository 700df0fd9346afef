"""A plan in another program's attention layers: what the modules of such programs have in common."""

from __future__ import annotations

import functools
import logging
import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import torch
from torch import Tensor

from ..account import Ran
from ..call import AttentionCall, Branch, StepContext
from ..layout import TokenLayout
from ..plan import ComponentPlan, Plan
from ..runtime import Runtime
from ..step_cache import StepCache

logger = logging.getLogger("sparse_dit")

PLAN = "SPARSE_DIT_PLAN"  # environment variable: a plan's path, built-in name or hub id
Shard = Callable[[], tuple[int, int]]
Setting = Callable[[StepCache], str]


class Unknown(Exception):
    """Something that a plan can't be followed without isn't known; the message says what."""


@dataclass(frozen=True)
class Forward:
    """Where a host's forward stands in a generation.

    Args:
        generation: An object that the host makes for each generation, compared by identity.
        step: Counts denoising steps from 0.
        sigma: Noise level, in [0, 1].
        branch: Half of classifier-free guidance; "any" if it isn't known.
        grid: Frames, rows and columns of tokens.
        before: Tokens before the grid, as text; None if the plan's own layout says where they are.
        used: The first so many tokens are valid, the rest is padding; None if all are.
    """

    generation: object
    step: int
    sigma: float
    branch: Branch
    grid: tuple[int, int, int]
    before: int | None = None
    used: int | None = None


class PlannedAttention:
    """What runs in the place of a host's attention: the plan where it can be followed, else the host's own.

    Args:
        plan: What is followed.
        host: The host's name, for what is logged.
        setting: What to set in the host for the nearest that it has to a step cache, in words.

    Raises:
        PlanError: If the plan names a step cache that isn't known.
    """

    def __init__(self, plan: Plan, host: str, setting: Setting) -> None:
        self.plan = plan
        self.host = host
        self._cache, self._setting = StepCache.of(plan), setting
        self._runtimes: dict[tuple[str, int, int], Runtime] = {}
        self._generations: dict[str, _Generation] = {}
        self._declined: set[str] = set()
        self._matched = False

    def knows(self, name: str | None) -> bool:
        """Whether the plan may be for a host's transformer, by the pipeline's name of it; None: any."""
        return name is None or name in self.plan.components

    def component(self, name: str | None, layer: str) -> str | None:
        """The plan's component that a layer is of, if the plan names it; to be asked when it is made.

        Args:
            name: The pipeline's name of the layer's transformer; None if the host doesn't tell.
            layer: The layer's module path.
        """
        parts = self.plan.components.items()
        found = [x for x, part in parts if layer in part.layers and name in (None, x)]
        if len(found) > 1:
            self.decline(
                f"the plan is for {sorted(found)}, and layers don't say of which transformer they are; use a "
                "plan with one component"
            )
        if len(found) != 1:
            return None
        if not self._matched:
            self._matched = True
            logger.info(
                "%s: attention follows a plan, in %s from %s on", self.host, found[0], layer
            )
            self.leave_cache()
        return found[0]

    def leave_cache(self) -> None:
        """Log, if the plan was searched with a step cache, that it is the host's to run."""
        if self._cache is not None:
            logger.warning(
                "the plan was searched with the step cache %s, which %s doesn't take from a plan: without "
                "one its forecast doesn't hold. The nearest that %s has: %s",
                *(self._cache, self.host, self.host, self._setting(self._cache)),
            )

    def decline(self, reason: str) -> None:
        """Log once why the host's own attention runs."""
        if reason not in self._declined:
            self._declined.add(reason)
            logger.warning("%s runs its own attention: %s", self.host, reason)

    def unmatched(self, layer: str) -> None:
        """Log once, while layers run and none has a name that is in the plan, that nothing is sparse."""
        if not self._matched and layer:
            part = next(iter(self.plan.components.values()))
            planned = next(iter(part.layers), "none")
            self.decline(
                f"the plan names layers like {planned!r}, and this model has ones like {layer!r}"
            )

    def forget(self) -> None:
        """Drop outputs and indices that are kept for other steps."""
        for runtime in self._runtimes.values():
            runtime.forget()
        self._generations.clear()

    @property
    def ran(self) -> tuple[Ran, ...]:
        """The account of all calls that a plan was looked up for."""
        return tuple(entry for runtime in self._runtimes.values() for entry in runtime.ran)

    @torch.compiler.disable
    def attend(
        self,
        component: str,
        layer: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float,
        forward: Callable[[], Forward],
        shard: Shard,
        stock: Callable[[], Tensor],
    ) -> Tensor:
        """Attention's output `[B, N, H, D]`.

        Args:
            component, layer: As in the plan, which names them.
            qkv: Each `[B, N, H, D]`, the heads of this process.
            scale: Factor of the logits.
            forward: Says where the forward stands.
            shard: The number of this process among those that the heads are divided among, and how many
                there are; asked only where there are fewer heads here than in the plan.
            stock: The host's own attention.
        """
        try:
            now, (q, k, v) = forward(), qkv
            part = self.plan.components[component]
            layout, kv_len = _placed(part, now, q, k)
            runtime = self._runtime(component, layer, q.shape[2], shard)
        except Unknown as unknown:
            self.decline(str(unknown))
            return stock()
        generation = self._generations.setdefault(component, _Generation())
        run = generation.number(now)
        context = StepContext(layout, now.sigma, now.branch, run, now.step, condition=run)
        return runtime(AttentionCall(layer, q, k, v, None, kv_len, scale, context, None, stock))

    def _runtime(self, component: str, layer: str, heads: int, shard: Shard) -> Runtime:
        """The runtime of this process' share of a component's heads."""
        part = self.plan.components[component]
        planned, _ = part.heads[layer]
        first = 0
        if heads != planned:
            number, count = shard()
            if heads * count != planned:
                raise Unknown(
                    f"{heads} heads in each of {count} processes, but the plan has {planned} in {layer}"
                )
            first = number * heads
        key = (component, first, heads)
        if key not in self._runtimes:
            self._runtimes[key] = Runtime(component, of_heads(part, first, heads), "auto")
        return self._runtimes[key]


@dataclass
class _Generation:
    """Counts a component's generations: a host tells none, but makes a new object for each."""

    count: int = -1
    step: int = -1
    seen: weakref.ref | None = field(default=None, repr=False)

    def number(self, now: Forward) -> int:
        other = self.seen is None or self.seen() is not now.generation
        if self.count < 0 or now.step < self.step or (other and now.step <= self.step):
            self.count += 1
        if other:
            self.seen = weakref.ref(now.generation)
        self.step = now.step
        return self.count


def named_plan(host: str, setting: Setting) -> PlannedAttention | None:
    """The plan that the environment names, for a host; None if it names none.

    A variable whose name is nearly that of `PLAN` is logged.

    Args:
        host, setting: See `PlannedAttention`.

    Raises:
        PlanError: If what it names is no plan.
    """
    if name := os.environ.get(PLAN):
        return _loaded(name, host, setting)
    nearly = [x for x in os.environ if x != PLAN and get_close_matches(x.upper(), [PLAN], 1, 0.85)]
    if nearly:
        logger.warning("%s follows no plan: %s is set, but not %s", host, nearly[0], PLAN)
    return None


@functools.cache
def _loaded(name: str, host: str, setting: Setting) -> PlannedAttention:
    return PlannedAttention(Plan.from_pretrained(name), host, setting)


def of_heads(part: ComponentPlan, first: int, count: int) -> ComponentPlan:
    """The plan of some consecutive heads of each layer."""
    stop = first + count
    if all(num_heads == count for num_heads, _ in part.heads.values()):
        return part
    return replace(
        part,
        heads={layer: (count, head_dim) for layer, (_, head_dim) in part.heads.items()},
        layers={
            layer: tuple(heads[first:stop] for heads in stages)
            for layer, stages in part.layers.items()
        },
    )


def _placed(
    part: ComponentPlan, now: Forward, q: Tensor, k: Tensor
) -> tuple[TokenLayout, Tensor | None]:
    """Where the tokens lie, and how many keys are valid where some aren't."""
    tokens, grid = q.shape[1], math.prod(now.grid)
    if k.shape[1] != tokens:
        raise Unknown(
            f"{tokens} queries see {k.shape[1]} keys: a part of the sequence in each process"
        )
    if not 0 <= now.sigma <= 1:
        raise Unknown(f"the noise level must be within 0 and 1, got {now.sigma:g}")
    before = _before(part, tokens - grid) if now.before is None else now.before
    after = tokens - grid - before
    if after < 0:
        raise Unknown(f"{tokens} tokens, but a grid of {now.grid} with {before} before it")
    layout = _layout(now.grid, before, after)
    if now.used is None or now.used == tokens:
        return layout, None
    if not before + grid <= now.used < tokens:
        raise Unknown(f"{now.used} of {tokens} tokens are valid, fewer than the grid of {now.grid}")
    return layout, _valid(now.used, q.shape[0], q.device)


def _before(part: ComponentPlan, others: int) -> int:
    """How many tokens that aren't of the grid lie before it: where those of the plan's layout do."""
    first, last = (part.layout.segments[i].kind == "global" for i in (0, -1))
    if others <= 0:
        return 0
    if first == last:
        raise Unknown(
            f"{others} tokens beside the grid, and the plan's layout ({part.layout}) doesn't say where"
        )
    return others if first else 0


@functools.lru_cache(maxsize=64)
def _layout(grid: tuple[int, int, int], before: int, after: int) -> TokenLayout:
    return TokenLayout.video(*grid, text_before=before, text_after=after)


@functools.lru_cache(maxsize=64)
def _valid(used: int, batch: int, device: torch.device) -> Tensor:
    return torch.full((batch,), used, dtype=torch.int64, device=device)
