"""Records the heads of one generation while it runs for its user, and chooses a plan from that.

It is the search's profile, made of a single dense generation: at a few noise levels some rows of every head
find where it looks, and others score what follows from that. What the search measures by generations of its
own, how much an error matters, is assumed; see `search.prior`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..call import AttentionCall, StepContext
from ..generation import Case
from ..integrations import heads_of
from ..layout import TokenLayout
from ..plan import Plan, config_hash
from ..search.assemble import first_plan, stage_shares
from ..search.candidates import tilings
from ..search.cost import Costs
from ..search.engine import with_break_even
from ..search.objective import Objective
from ..search.pricing import cost_tables, inside
from ..search.prior import assumed_sensitivity
from ..search.profile import ComponentProfile
from ..search.profile_file import read_parts, size_of, write_parts
from ..search.projection import projections
from ..search.provenance import made_with
from ..search.recorder import Recorder
from ..search.solve import stages_of, whole_problem
from ..search.statistics import empty_statistics
from ..search.tune import allowed_loss
from ..search.verify import Reference
from ..timing import Stopwatch, Taken, Timer

LEVELS = 4  # noise levels that a plan tells apart, as in a search of 12 steps
ROWS = 32  # sampled query rows of each head, to find and to score: half of a search's
SIGMAS = (1.0, 0.93, 0.8, 0.5)  # where the number of steps isn't known
REFINING_ROWS = 16
MOST_REFINED = 3  # later generations whose heads are scored too
# Above the PSNR that is asked for, as nothing is generated to see how far off the forecast is: on the
# embedded model at 4,608 tokens it is 26 to 35 dB where 31.5 are forecast
MARGIN_DB = 4.0
LEAST_STEPS = 2
FORMAT = "sparse_dit learned profile 2"
OLD_FORMAT = "sparse_dit learned profile 1"  # what all heads share stands there for each
MOST_BYTES = 1 << 29  # of what is kept between processes


@dataclass(eq=False)
class _Part:
    """One transformer's share of the generation."""

    profile: ComponentProfile
    recorder: Recorder
    sigmas: list[float] = field(default_factory=list)  # of every forward and item of the batch
    attention: Stopwatch = field(default_factory=Stopwatch)
    first: str | None = None  # the layer that a forward begins with
    step: int = -1


class Learner:
    """What is learned at one size.

    Args:
        modules: The pipeline's transformers, by component name.
        steps: Denoising steps of the generation; None if that isn't known.
        seed: The seed by which rows are sampled.

    Attributes:
        refined: How many later generations are in it.
        waiting: Whether something was added since the last plan was made.
    """

    def __init__(self, modules: Mapping[str, nn.Module], steps: int | None, seed: int = 0) -> None:
        self.modules = modules
        self.steps = steps
        self.seed = seed
        self.refined = 0
        self.waiting = False
        self._parts: dict[str, _Part] = {}
        self._taken = 0  # steps that have begun
        self._timer: Timer | None = None
        self._recording = self._recording_wall = 0.0
        self._until_last = Taken(0.0, 0.0)  # from the first step's begin to the last one's
        self._branch: str | None = None  # that is recorded in the present step
        self._levels = 0
        self._tables: dict[str, Costs] | None = None
        self._scale: float | None = None  # measured over forecast loss
        self._loss = 0.0  # that the last plan was forecast

    def record(self, name: str, call: AttentionCall, layout: TokenLayout) -> Tensor:
        """Stock attention's output `[B, N, H, D]`, of a call whose `whole_layout` is given.

        Raises:
            ValueError: If what is recorded isn't finite, or doesn't fit what was recorded before.
        """
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = self._begun(name)
        self._follow(part, call, layout)
        self._look(part.recorder, call, layout)
        return part.attention.run(call.stock, call.q.device)

    def refine(self, name: str, call: AttentionCall, layout: TokenLayout) -> None:
        """Score the heads of a later generation, which runs sparse, at one noise level in two."""
        part = self._parts[name]
        if call.layer == part.first:
            level = part.profile.nearest_level(call.context.sigma or 0.0)
            due = level != part.step and level % 2 == self.refined % 2
            part.step = level
            self._branch = "any" if due else None
        self._look(part.recorder, call, layout)

    def keep(self) -> None:
        """Add what a generation gave, and get ready for the next one."""
        later = [p for p in self._parts.values() if p.recorder.run is not p.profile]
        for part in later:
            part.profile.add(part.recorder.run)
        self.refined += bool(later)
        for name, part in self._parts.items():
            part.recorder = self._recorder(name, part.profile, "score")
            part.step = -1
        self.waiting = True

    def write(self, path: Path) -> bool:
        """Write what is known to a file, from which another process goes on; False if it is too large.

        Raises:
            OSError: If it can't be written.
        """
        parts = {name: part.profile for name, part in self._parts.items()}
        for part in parts.values():
            part.drop_unscored()
        if sum(map(size_of, parts.values())) > MOST_BYTES:
            return False
        header = {
            "waiting": self.waiting,
            "steps": self.steps,
            "seed": self.seed,
            "refined": self.refined,
            "taken": self._taken,
            "until_last": [self._until_last.seconds, self._until_last.wall],
            "scale": self._scale,
            "forwards": {
                name: {"sigmas": p.sigmas, "seconds": p.attention.seconds, "first": p.first}
                for name, p in self._parts.items()
            },
        }
        write_parts(parts, path, FORMAT, header)
        return True

    @staticmethod
    def read(path: Path, modules: Mapping[str, nn.Module]) -> Learner:
        """Inverse of `write`, for the same transformers.

        Raises:
            PlanError: If the file is missing or damaged, of another version, or of other transformers.
        """

        def restored(
            parts: dict[str, ComponentProfile], header: dict[str, Any], _: dict[str, Tensor]
        ) -> Learner:
            learner = Learner(modules, header["steps"], int(header["seed"]))
            learner.waiting = bool(header["waiting"])
            learner.refined, learner._taken = int(header["refined"]), int(header["taken"])
            learner._until_last = Taken(*map(float, header["until_last"]))
            learner._scale = None if header["scale"] is None else float(header["scale"])
            for name, profile in parts.items():
                ran = header["forwards"][name]
                recorder = learner._recorder(name, profile, "score")
                watch = Stopwatch(float(ran["seconds"]))
                sigmas = [float(sigma) for sigma in ran["sigmas"]]
                learner._parts[name] = _Part(profile, recorder, sigmas, watch, str(ran["first"]))
            return learner

        return read_parts(path, (FORMAT, OLD_FORMAT), restored)

    def correct(self, loss: float) -> None:
        """Take the loss that the last plan was measured to have, for those that are made from now on."""
        if loss > 0 and self._loss > 0:
            self._scale = loss / self._loss

    @property
    def recording(self) -> float:
        """Seconds that recording has taken."""
        return self._recording

    @property
    def complete(self) -> bool:
        """Whether the generation came to its end, as far as can be told."""
        known = self._parts and all(part.profile.scores for part in self._parts.values())
        wanted = LEAST_STEPS if self.steps is None else max(LEAST_STEPS, self.steps)
        return bool(known) and self._taken >= wanted

    def plan(self, pipeline_class: str, objective: Objective, backend: str) -> Plan:
        """The plan that follows from what was recorded.

        Args:
            pipeline_class: The name of the pipeline's class; empty for a transformer alone.
            objective: What is asked of it.
            backend: The sparse backend whose costs are measured.

        Raises:
            ValueError: If the objective is out of reach.
        """
        parts = {name: part.profile for name, part in self._parts.items()}
        for part in parts.values():
            part.drop_unscored()
        stages = {name: stages_of(part.sigmas) for name, part in parts.items()}
        modules = {name: self.modules[name] for name in parts}
        dense = self._reference()
        calls = {name: dense.calls(name, stages[name]) for name in parts}
        if self._tables is None:  # the same for plans that are made anew
            self._tables = inside(cost_tables(modules, parts, backend, None), parts, calls, [dense])
        tables = self._tables
        matters = {n: assumed_sensitivity(stages[n], len(part.layers)) for n, part in parts.items()}
        task = whole_problem(parts, matters, tables, calls, dense.seconds)
        if self._scale is None:
            floor = (objective.min_psnr or 0.0) + MARGIN_DB
            allowed = allowed_loss(objective.min_psnr, floor=floor)
        else:
            allowed = allowed_loss(objective.min_psnr, self._scale)
        choice = objective.choose(task, allowed)
        self._loss, self.waiting = choice.loss, False
        plan = first_plan(pipeline_class, parts, task, choice, tables)
        plan = with_break_even(plan, task, choice, tables)
        record = {
            **made_with("torch", "diffusers"),
            "objective": objective.to_dict(),
            "stage_shares": stage_shares(task),
            "learned_from": 1 + self.refined,
            "errors_behind_projection": True,
            "sensitivity": "assumed, see sparse_dit.search.prior",
            "seconds": "of denoising alone: text encoders and decoders weren't timed",
        }
        return replace(plan, provenance=record)

    def _begun(self, name: str) -> _Part:
        module: Any = self.modules[name]
        profile = ComponentProfile(
            type(module).__name__, config_hash(module.config), heads_of(module)
        )
        return _Part(profile, self._recorder(name, profile, "both"))

    def _recorder(self, name: str, profile: ComponentProfile, phase: str) -> Recorder:
        seed, rows = self.seed + self.refined, ROWS if phase == "both" else REFINING_ROWS
        return Recorder(profile, phase, rows, seed, projections=projections(self.modules[name]))

    def _follow(self, part: _Part, call: AttentionCall, layout: TokenLayout) -> None:
        """Note that a forward or a step begins, if one does."""
        context = call.context
        part.first = part.first or call.layer
        if call.layer != part.first or context.sigma is None:
            return
        part.sigmas += [context.sigma] * call.q.shape[0]
        if context.step == part.step:
            return
        fresh = part.step < 0
        part.step = context.step
        if self._timer is None:
            self._timer = Timer(call.q.device)
        else:
            now = self._timer.stop()
            self._until_last = Taken(now.seconds - self._recording, now.wall - self._recording_wall)
        due = fresh or self._due(context)
        self._taken += 1
        self._branch = ("uncond" if self._levels % 2 else "cond") if due else None
        self._levels += due
        if fresh:
            self._make_room(part, layout)

    def _due(self, context: StepContext) -> bool:
        if self.steps is not None:
            chosen = min(self.steps, LEVELS)
            return self._taken in {n * self.steps // chosen for n in range(chosen)}
        return self._levels < len(SIGMAS) and (context.sigma or 0.0) <= SIGMAS[self._levels]

    def _make_room(self, part: _Part, layout: TokenLayout) -> None:
        """Candidates depend on how many choices a plan will have, so these are known from the start."""
        part.profile.note_layout(layout)
        for layer, (heads, _) in part.profile.heads.items():
            for level in range(min(LEVELS, self.steps or LEVELS)):
                room = empty_statistics(layout, tilings(layout), heads)
                part.profile.found.setdefault((level, layer), room)

    def _look(self, recorder: Recorder, call: AttentionCall, layout: TokenLayout) -> None:
        """Record a call if its forward is due."""
        sigma = call.context.sigma
        due = self._branch == "any" or call.context.branch in ("any", self._branch)
        if self._branch is None or not due or sigma is None:
            return
        timer = Timer(call.q.device)
        recorder.record(call, layout, sigma)
        taken = timer.stop()
        self._recording += taken.seconds
        self._recording_wall += taken.wall

    def _reference(self) -> Reference:
        """The generation, as the search keeps its dense ones, but for what came out."""
        share = self._taken / max(1, self._taken - 1)  # the last step's end isn't seen
        taken = Taken(self._until_last.seconds * share, self._until_last.wall * share)
        sigmas = {name: part.sigmas for name, part in self._parts.items()}
        attention = {name: part.attention.seconds for name, part in self._parts.items()}
        return Reference(Case("learned"), None, taken, sigmas, attention)
