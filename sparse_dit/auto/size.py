"""What is known of one class of lengths at which a pipeline that is patched by `"auto"` runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..plan import Plan
from ..runtime import Runtime
from .learner import Learner


@dataclass(eq=False)
class Size:
    """What is known of one class of lengths.

    Args:
        name: The name of its plan in the store.
        learner: What records; None if nothing is recorded any more.
        plan: The plan, once there is one.
        runtimes: What follows it, by component name.
        failed: Why there won't be one.
        runs: The last run of each component, by name, and what it was conditioned on.
    """

    name: str
    learner: Learner | None = None
    plan: Plan | None = None
    runtimes: dict[str, Runtime] = field(default_factory=dict)
    failed: str | None = None
    runs: dict[str, int] = field(default_factory=dict)
    seen: set[int | None] = field(default_factory=set)
    refining: bool = False
    unverified: str = ""  # why it couldn't be measured

    @property
    def note(self) -> str:
        """Where it stands."""
        if self.failed:
            return f"dense, as no plan could be learned: {self.failed}"
        if self.plan is None:
            return "dense, as a plan is being learned"
        count, measured = self.plan.provenance.get("learned_from", 1), self.plan.measured
        text = f"by a plan learned from {count} generations, kept as {self.name}"
        if measured:
            text += f"; verified: {measured['psnr_db']:.1f} dB at {measured['speedup']:.2f}x"
        return text + (f"; not verified: {self.unverified}" if self.unverified else "")
