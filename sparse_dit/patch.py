"""`patch`: run a model's attention as a plan says. `unpatch`: stock again, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from .account import Ran
from .attaching import attach_all, detached_on_error, enable_step_cache, order_notes, sort_tokens
from .attention import BACKENDS
from .call import AttentionCall
from .denoising import DENOISING, denoising_plan, of_text
from .exact import Exact
from .fastest import FASTEST, STOCK
from .making import Making
from .online import RULES, online_plan
from .plan import Plan, PlanError, config_hash
from .runtime import How, Runtime
from .step_cache import StepCache, cache_notes
from .summary import Summary, summarise
from .token_order import MODEL, PLAN, TOKEN_ORDERS

if TYPE_CHECKING:
    from .integrations import Attachment


# in the place of a plan
EXACT = "exact"  # what the mask lets through, without approximation
AUTO = "auto"  # learned from the first generation


def patch(
    pipe_or_transformer: Any,
    plan: str | os.PathLike[str] | Plan,
    *,
    backend: str = "auto",
    nan_guard: bool = False,
    dense: str = STOCK,
    step_cache: bool = True,
    token_order: str = MODEL,
    density: float | None = None,
    sparsity: float | None = None,
    threshold: float | None = None,
    tau: float | None = None,
    top_p: float | None = None,
    keep: float | None = None,
    min_psnr: float | None = None,
    target_speedup: float | None = None,
    cache: str | os.PathLike[str] | None = None,
    verify: bool | None = None,
) -> Handle:
    """Make a pipeline's transformers, or a model of transformers, run attention as the plan says.

    Args:
        pipe_or_transformer: A diffusers pipeline or one of its transformers; a language model or VLM of
            transformers, or a pipeline with one.
        plan: A path, a folder, a built-in name, a hub id, or a `Plan`. `"exact"` needs none: padding, causal
            order and sliding windows are skipped instead of masked, with equal results to rounding. Nor do
            `"online"`, `"adaspa"`, `"xattention"`, `"sol"` and `"svg2"`, by which heads find what they
            compute while they generate; nor, for a diffusion language model, `"online"`, `"sparsed"` and
            `"mage"`. `"auto"` learns one from the first generation of a diffusers pipeline, which is
            dense and somewhat slower, and keeps it for later ones.
        backend: `"auto"` or one that `sparse_attention` knows.
        nan_guard: Compute heads that come out of sparse attention with NaN or Inf dense instead, logged once.
            Each sparse call then reads its output once more and waits for the device.
        dense: Who computes calls that the plan leaves dense: `"stock"`, bit for bit what the model gives, or
            `"fastest"`: whichever exact kernel is found to be the fastest here, equal to rounding;
            `summary()` says what each took.
        step_cache: Enable the step cache that the plan was searched with, if it was with one, until the patch
            is removed. One that is enabled already stays; `summary()` says if it is another.
        token_order: `"model"`: tokens lie as the model puts them, and each layer's kernel sorts them for its
            heads. `"plan"`: they are sorted once a forward by the tile of most heads, equal to rounding;
            where that can't be done they aren't, and `summary()` says why.
        density, sparsity, threshold, tau, top_p: Of `"online"`, `"adaspa"`, `"xattention"`, `"sol"` and
            `"svg2"` in turn the one number that it takes; see `online.RULES`.
        keep: Of `"sparsed"` and `"mage"`: the share of the keys that is seen; see `denoising.DENOISING`,
            which says what `density` of `"online"` is there.
        min_psnr, target_speedup, cache, verify: Of `"auto"`, what is asked of the plan, where plans are kept,
            and whether the first generation is made once more to measure it; see `auto.AutoOptions`.

    Returns:
        The handle that tells what ran and takes the patch off; also a context manager.

    Raises:
        ValueError: If the plan is for another model, the backend is unknown, the pipeline is patched already,
            or its transformer doesn't take the plan's step cache.
        TypeError: If there is no transformer, an attention layer can't be patched, or `plan` is no plan.
        NotImplementedError: If the transformer's class is not supported.
    """
    from .integrations import unpatched

    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}; expected 'auto' or one of {sorted(BACKENDS)}"
        )
    if dense not in (STOCK, FASTEST):
        raise ValueError(f"dense must be {STOCK!r} or {FASTEST!r}, got {dense!r}")
    if token_order not in TOKEN_ORDERS:
        raise ValueError(f"token_order must be one of {TOKEN_ORDERS}, got {token_order!r}")
    if not isinstance(step_cache, bool):
        raise TypeError(f"step_cache must be True or False, got {step_cache!r}; a plan says which")
    if token_order == PLAN and plan in (EXACT, AUTO):
        raise ValueError(f"{plan!r} has no tiles to sort by; leave token_order={PLAN!r} out")
    found, how = unpatched(pipe_or_transformer), How(backend, nan_guard, dense)
    if not isinstance(plan, Plan | str | os.PathLike):
        raise TypeError(
            "plan must be 'auto', 'exact', a rule, a path, a built-in name, a hub id or a Plan, got "
            f"{type(plan).__name__}"
        )
    given = {
        "density": density, "sparsity": sparsity, "threshold": threshold, "tau": tau, "top_p": top_p,
        "keep": keep,
        "min_psnr": min_psnr, "target_speedup": target_speedup, "cache": cache, "verify": verify,
    }  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if isinstance(plan, str) and plan in DENOISING and of_text(pipe_or_transformer, plan):
        plan, options = denoising_plan(pipe_or_transformer, plan, **options), {}
    elif isinstance(plan, str) and plan in RULES:
        plan, options = online_plan(pipe_or_transformer, plan, **options), {}
    if options and plan != AUTO:
        named = ", ".join(sorted(options))
        rules = ", ".join(dict.fromkeys([*RULES, *DENOISING]))
        raise TypeError(f"{named} can be given with 'auto' and {rules} alone")
    if plan == AUTO:
        from .auto import AutoOptions, attach_auto

        if other := sorted(options.keys() - {"min_psnr", "target_speedup", "cache", "verify"}):
            raise TypeError(
                f"'auto' takes min_psnr or target_speedup, cache and verify, not {other[0]}"
            )
        asked = AutoOptions(**options)
        session, intercepts = attach_auto(pipe_or_transformer, found, asked, how)
        attachments = attach_all(found, intercepts, pipe_or_transformer)
        return Handle(None, attachments, intercepts, session)
    if plan == EXACT:
        if dense != STOCK:
            raise ValueError(
                f"'exact' computes by its own kernel or stock attention, got dense={dense!r}"
            )
        exact = {name: Exact(name, backend, nan_guard) for name in found}
        return Handle(None, attach_all(found, exact, pipe_or_transformer), exact)
    if not isinstance(plan, Plan):
        plan = _loaded(plan)
    targets = _targets(pipe_or_transformer, found, plan)
    for name, transformer in targets.items():
        check_fits(plan, name, transformer)
    planned = StepCache.of(plan)
    runtimes = {name: Runtime(name, plan.components[name], *how) for name in targets}
    attachments = attach_all(targets, runtimes, pipe_or_transformer)
    with detached_on_error(attachments):
        if planned is not None and step_cache:
            enable_step_cache(attachments, planned)
        if token_order == PLAN:
            sort_tokens(attachments, {name: plan.components[name] for name in targets})
    return Handle(plan, attachments, runtimes)


def _loaded(name: str | os.PathLike[str]) -> Plan:
    """The plan of that name; what its name may have been meant for is said if there is none."""
    try:
        return Plan.from_pretrained(name)
    except PlanError as error:
        meant = get_close_matches(str(name), [AUTO, EXACT, *RULES, *DENOISING], 1, 0.8)
        if meant and not os.path.exists(name):
            raise PlanError(f"{error}; did you mean {meant[0]!r}?") from None
        raise


def unpatch(pipe_or_transformer: Any) -> None:
    """Take the patch off a pipeline or transformer, also off a deep copy of one; twice is harmless.

    Raises:
        TypeError, NotImplementedError: If the object is none that could have been patched.
    """
    from .integrations import attachment_of, components

    for transformer in components(pipe_or_transformer).values():
        if attachment := attachment_of(transformer):
            if isinstance(attachment.intercept, Patched):
                attachment.intercept.forget()
            attachment.detach()


@runtime_checkable
class Patched(Protocol):
    """What runs in place of a transformer's attention, and accounts for it."""

    def __call__(self, call: AttentionCall) -> Tensor: ...
    def forget(self) -> None: ...
    @property
    def ran(self) -> tuple[Ran, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


class Learning(Protocol):
    """What learns a plan while the pipeline runs; `plan` is None until there is one."""

    @property
    def plan(self) -> Plan | None: ...


class Handle:
    """A patch in place: `summary()` says what ran, `remove()` restores the stock objects.

    As a context manager it removes the patch at the end of the block, and a removed one can't be entered
    again.
    """

    def __init__(
        self,
        plan: Plan | None,
        attachments: dict[str, Attachment],
        runtimes: Mapping[str, Patched],
        learning: Learning | None = None,
    ) -> None:
        self._plan = plan
        self._attachments = attachments
        self._runtimes = runtimes
        self._learning = learning

    @property
    def plan(self) -> Plan | None:
        """The plan that is followed; None if attention is exact, or the plan is still being learned."""
        return self._plan if self._learning is None else self._learning.plan

    @property
    def ran(self) -> dict[str, tuple[Ran, ...]]:
        """What ran so far in each component, one entry for each layer, stage and way to run."""
        return {name: runtime.ran for name, runtime in self._runtimes.items()}

    @property
    def kept_bytes(self) -> int:
        """Memory of the indices that were found in calls and are kept for later steps."""
        return sum(runtime.kept_bytes for runtime in self._followed)

    def time_making(self) -> Making:
        """From now on measure how long indices take to make, which slows some calls down; see `Making`."""
        making = Making()
        for runtime in self._followed:
            runtime.making = making
        return making

    @property
    def _followed(self) -> list[Runtime]:
        return [one for one in self._runtimes.values() if isinstance(one, Runtime)]

    def summary(self) -> Summary:
        """What the plan forecasts and what ran so far; prints as a table."""
        lost = {name: tuple(a.lost) for name, a in self._attachments.items()}
        replaced = tuple(name for name, a in self._attachments.items() if a.replaced)
        notes = [note for runtime in self._runtimes.values() for note in runtime.notes]
        notes += [*self._cache_notes(), *order_notes(self._attachments)]
        kind = "exact" if self._learning is None else "learning"
        return summarise(self.plan, self.ran, lost, replaced, tuple(notes), kind)

    def _cache_notes(self) -> list[str]:
        """What the plan's step cache and the enabled ones have to do with one another."""
        from .integrations import Caching

        if self._plan is None or StepCache.of(self._plan) is None:
            return []
        found = {
            name: (attachment.step_cache, attachment.steps)
            for name, attachment in self._attachments.items()
            if isinstance(attachment, Caching)
        }
        steps = next((steps for _, steps in found.values()), None)
        return cache_notes(self._plan, {name: cache for name, (cache, _) in found.items()}, steps)

    def begin_run(self) -> None:
        """Say that the next forward begins a generation, so that it takes nothing from the one before.

        A patched pipeline tells that by itself. In a loop of your own it is needed where a generation may be
        cut off and the next one, with the same tensor of prompt embeddings, starts at lower noise.
        """
        for attachment in self._attachments.values():
            attachment.begin_run()

    def remove(self) -> None:
        """Restore the very stock processors. What was counted stays in `summary()`; twice is harmless."""
        for runtime in self._runtimes.values():
            runtime.forget()
        for attachment in self._attachments.values():
            attachment.detach()

    def __enter__(self) -> Handle:
        if any(attachment.intercept is None for attachment in self._attachments.values()):
            raise RuntimeError(
                "a handle must be in place to enter its block, but this patch was removed already; "
                "call sparse_dit.patch(pipe, plan) again"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def _targets(pipe: Any, found: dict[str, nn.Module], plan: Plan) -> dict[str, nn.Module]:
    """The transformers that the plan is for, by its own component names."""
    names = list(plan.components)
    if isinstance(pipe, nn.Module):
        if len(names) != 1:
            raise ValueError(
                f"the plan has components {names}; patch the pipeline, not one transformer"
            )
        return {names[0]: next(iter(found.values()))}
    if missing := sorted(set(names) - set(found)):
        raise ValueError(
            f"the plan has components {missing} that {type(pipe).__name__} lacks; "
            f"it has {sorted(found)}"
        )
    return {name: found[name] for name in names}


def check_fits(plan: Plan, name: str, transformer: nn.Module) -> None:
    """Raise PlanError unless the plan's component `name` was made for a transformer like this one."""
    from .integrations import heads_of

    config: Any = transformer.config
    planned = plan.components[name].model_class
    kinds = [cls.__name__ for cls in type(transformer).__mro__]
    plan.check_model(
        name,
        model_class=planned if planned in kinds else kinds[0],
        config_hash=config_hash(config),
        heads=heads_of(transformer),
    )
