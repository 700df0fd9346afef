"""A pipeline patched by `"auto"`: which sizes are learned, which run by a plan, and the account of it."""

from __future__ import annotations

import atexit
import copy
import logging
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..account import Account, Ran
from ..call import AttentionCall
from ..fingerprint import fingerprint
from ..integrations import host_of, library_of
from ..plan import Plan
from ..runtime import How, Runtime
from ..search.sampling import whole_layout
from .learner import MOST_REFINED, Learner
from .options import AutoOptions
from .size import Size
from .store import PlanStore, plan_name, size_class, tokens_of
from .verify import release, watch

logger = logging.getLogger("sparse_dit")

LEARNING = "a plan is being learned from this generation"
PLANNED = {LEARNING}
_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """What the intercepts of one pipeline's transformers share.

    Args:
        pipe: The pipeline, or a transformer alone.
        modules: Its transformers, by component name.
        options: What is asked for.
        how: In which ways plans are run.
    """

    def __init__(
        self,
        pipe: Any,
        modules: Mapping[str, nn.Module],
        options: AutoOptions,
        how: How,
    ) -> None:
        self.sizes: dict[int, Size] = {}
        self.modules = dict(modules)
        self.options = options
        self.how = how
        self.store = None if options.cache == "" else PlanStore(options.cache)
        self.present: Size | None = None
        self._pipe = None if isinstance(pipe, nn.Module) else weakref.ref(pipe)
        self._class = "" if isinstance(pipe, nn.Module) else type(pipe).__name__
        self._model = fingerprint(self.modules)
        self.verifying = False  # a generation that was learned from is made again

    def attend(self, name: str, call: AttentionCall, account: Account) -> Tensor:
        """Attention's output `[B, N, H, D]`: dense and recorded, or by the plan of the call's size."""
        layout = whole_layout(call)
        if layout is None:
            runtime = self.present and self.present.runtimes.get(name)
            why = "a call that can't be learned"
            return runtime(call) if runtime else _stock(call, account, why)
        size = self._size(name, call, size_class(layout.num_grid))
        if size.learner is not None and not size.runtimes:
            try:
                out = size.learner.record(name, call, layout)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                self._fail(size, error)
            else:
                _count(call, account, LEARNING)
                return out
        runtime = size.runtimes.get(name)
        if runtime is None:
            return _stock(call, account, size.failed or "the plan has no such transformer")
        if size.refining and size.learner is not None:
            try:
                size.learner.refine(name, call, layout)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                self._stop_refining(size, error)
        return runtime(call)

    @property
    def plan(self) -> Plan | None:
        """The plan of the size that ran last; None while it is learned."""
        size = self.present
        if size is not None and size.plan is None and size.learner is not None:
            self._finish(size)
        return None if size is None else size.plan

    @property
    def notes(self) -> tuple[str, ...]:
        """Where each size stands."""
        return tuple(f"about {tokens_of(n):,} tokens: {s.note}" for n, s in self.sizes.items())

    def learned(self) -> float | None:
        """Seconds that recording took in the generation that just ended, if it gave a size's first plan."""
        size = self.present
        if size is None or size.plan is not None or self.plan is None or size.learner is None:
            return None
        return size.learner.recording

    def replan(self, mse: float) -> bool:
        """Make another plan, by what the newest one came to, and follow it; whether there is one."""
        size = self.present
        assert size is not None and size.learner is not None, "it has just been learned"
        size.learner.correct(mse)
        try:
            plan = size.learner.plan(self._class, self.options.objective, self.how.backend)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            logger.warning("a learned plan can't be corrected: %s", error)
            return False
        self._follow(size, plan)
        return True

    def take(self, plan: Plan) -> None:
        """Follow a plan of the size that ran last, and keep it."""
        assert self.present is not None, "it ran"
        self._take(self.present, plan)

    def unverified(self, why: str) -> None:
        """Note why the newest plan couldn't be measured."""
        logger.warning("a learned plan wasn't verified: %s", why)
        if self.present is not None:
            self.present.unverified = why

    def release(self) -> None:
        """Give the pipeline its own class back, if its calls are verified."""
        pipe = None if self._pipe is None else self._pipe()
        if pipe is not None:
            release(pipe)

    def _size(self, name: str, call: AttentionCall, number: int) -> Size:
        """The state of a call's size, after what begins with the call has begun."""
        size = self.sizes.get(number)
        run = call.context.run
        if size is not None and size.runs.get(name) == run:
            return size
        if self.present is None or run not in self.present.runs.values():  # a generation begins
            self._check_model()
            size = self.sizes.get(number)
        if size is None:
            size = self.sizes[number] = self._found(number)
        elif name in size.runs and size.learner is not None:
            self._end(size)
        size.runs[name] = run
        self.present = size
        if size.plan is not None and size.learner is not None:
            condition = call.context.condition
            size.refining |= condition not in size.seen and not self.verifying
            size.seen.add(condition)
        return size

    def _found(self, number: int) -> Size:
        """A size that wasn't seen yet: by its plan in the store, or to be learned."""
        name = plan_name(self.modules, number, self.options.objective.to_dict())
        size = Size(name)
        if self.store is not None:
            plan = self.store.find(name)
            size.learner = self.store.learner(name, self.modules)
            if plan is not None and set(plan.components) <= set(self.modules):
                self._follow(size, plan)
            if size.learner is not None and size.learner.waiting:
                self._make(size, size.learner)
        if size.plan is None and not size.failed:
            size.learner = Learner(self.modules, self._steps())
        return size

    def _steps(self) -> int | None:
        """Steps of the generation that begins, as its pipeline's scheduler says."""
        pipe = None if self._pipe is None else self._pipe()
        return None if pipe is None else host_of(pipe).steps_of(pipe)

    def _end(self, size: Size) -> None:
        """A generation of a size that is being learned is over, as the next one begins."""
        if size.plan is None:
            self._finish(size)
            if size.plan is None and not size.failed:  # cut off: once more
                size.learner = Learner(self.modules, self._steps())
        elif size.refining:
            size.refining = False
            self._finish(size)
        size.runs.clear()  # which the other transformers' first calls of this generation don't end again

    def _finish(self, size: Size) -> None:
        """Make the plan of what was recorded, if that is a whole generation, and keep it."""
        learner = size.learner
        if learner is None or not (size.plan is not None or learner.complete):
            return
        self._make(size, learner)

    def _make(self, size: Size, learner: Learner) -> None:
        """Make the plan of what is known."""
        try:
            if not learner.waiting:
                learner.keep()
            plan = learner.plan(self._class, self.options.objective, self.how.backend)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            if size.plan is None:
                self._fail(size, error)
            else:
                self._stop_refining(size, error)
            return
        if learner.refined >= MOST_REFINED:
            size.learner = None
        self._take(size, plan)

    def settle(self) -> None:
        """Keep what generations gave of which no plan was made yet, as no other one follows."""
        for size in self.sizes.values():
            learner = size.learner
            if self.store is None or learner is None or learner.waiting or self.verifying:
                continue
            if size.refining or (size.plan is None and learner.complete):
                try:
                    learner.keep()
                except (ValueError, RuntimeError) as error:
                    self._stop_refining(size, error)
                else:
                    self.store.keep(size.name, size.plan, learner)

    __del__ = settle  # a model that goes before its process ends has learned too

    def __deepcopy__(self, memo: dict[int, object]) -> Session:
        fresh = memo[id(self)] = copy.copy(self)
        fresh.sizes, fresh.present, fresh._pipe = {}, None, None
        fresh.modules = {name: copy.deepcopy(m, memo) for name, m in self.modules.items()}
        _SESSIONS.add(fresh)
        return fresh

    def _take(self, size: Size, plan: Plan) -> None:
        self._follow(size, plan)
        if self.store is not None:
            self.store.keep(size.name, plan, size.learner)

    def _follow(self, size: Size, plan: Plan) -> None:
        size.plan = plan
        size.runtimes = {
            name: Runtime(name, part, *self.how) for name, part in plan.components.items()
        }

    def _stop_refining(self, size: Size, error: Exception) -> None:
        size.refining, size.learner = False, None
        logger.warning("a learned plan isn't refined any more: %s", error)

    def _fail(self, size: Size, error: Exception) -> None:
        size.learner, size.failed = None, (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("no plan could be learned, attention stays dense: %s", size.failed)

    def _check_model(self) -> None:
        """Begin anew if the weights aren't what they were: a LoRA came or went."""
        model = fingerprint(self.modules)
        if model != self._model:
            self._model = model
            self.sizes.clear()
            self.present = None


class Auto:
    """The intercept of one transformer of a pipeline that is patched by `"auto"`; a copy learns for itself.

    Args:
        component: Name of the component.
        session: What the pipeline's transformers share.
    """

    def __init__(self, component: str, session: Session) -> None:
        self.component = component
        self.session = session
        self._account = Account(component, PLANNED)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention's output `[B, N, H, D]`."""
        return self.session.attend(self.component, call, self._account)

    def forget(self) -> None:
        """Drop what is kept for other steps, as the patch is taken off."""
        self.session.settle()
        for size in self.session.sizes.values():
            if self.component in size.runtimes:
                size.runtimes[self.component].forget()
        self.session.release()

    def __deepcopy__(self, memo: dict[int, object]) -> Auto:
        return Auto(self.component, copy.deepcopy(self.session, memo))

    @property
    def ran(self) -> tuple[Ran, ...]:
        """What was learned from, and what ran by the plan of the size that ran last."""
        present = self.session.present
        runtime = present.runtimes.get(self.component) if present else None
        return self._account.ran + (runtime.ran if runtime else ())

    @property
    def notes(self) -> tuple[str, ...]:
        """Where each size stands, from the first transformer alone."""
        first = next(iter(self.session.modules)) == self.component
        return self.session.notes if first else ()


def attach_auto(
    pipe: Any,
    modules: Mapping[str, nn.Module],
    options: AutoOptions,
    how: How,
) -> tuple[Session, dict[str, Auto]]:
    """The intercepts of a pipeline's transformers, by component name, and what they share.

    Raises:
        TypeError: If the model is none of diffusers.
    """
    if library_of(pipe) != "diffusers":
        raise TypeError(
            f'"auto" learns from a diffusers pipeline, got a {type(pipe).__name__}: search a plan with '
            'sparse_dit.search(model, texts, ...), or take "online" if it is a diffusion language model'
        )
    if options.verify and isinstance(pipe, nn.Module):
        raise TypeError(
            f"verify generates again, which takes the pipeline, got a {type(pipe).__name__}"
        )
    session = Session(pipe, modules, options, how)
    _SESSIONS.add(session)
    if options.verify:
        watch(pipe)
    return session, {name: Auto(name, session) for name in modules}


@atexit.register
def _settle() -> None:
    """Processes that generate once learn too."""
    for session in list(_SESSIONS):
        session.settle()


def _stock(call: AttentionCall, account: Account, reason: str) -> Tensor:
    account.warn(reason)
    out = call.stock()
    _count(call, account, reason)
    return out


def _count(call: AttentionCall, account: Account, reason: str) -> None:
    tokens = call.k.shape[1]
    pairs = call.q.shape[0] * call.q.shape[2] * call.q.shape[1] * tokens
    account.count((call.layer, None, reason, None), tokens, pairs, 1.0)
