"""The plans that a server runs, by the names that requests may give, and the points of their fronts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plan import Plan
from ..plan.hub import find
from ..search.front import Front, front_path, pick, read_front
from .spec import JobSpec

DENSE = "dense"  # the name that runs without a plan


@dataclass(frozen=True, eq=False)
class Served:
    """A plan with the front of its search, if one lies beside it.

    Args:
        name: What requests call it.
        plan: The plan.
        front: The other points.
    """

    name: str
    plan: Plan
    front: Front | None

    @functools.lru_cache(maxsize=32)  # noqa: B019 - as many as plans are served, for the process's life
    def at(self, speedup: float | None) -> Plan:
        """The plan, or the point of its front with at least this forecast speed-up.

        Raises:
            ValueError: If there is no front, or no such point in it.
        """
        if speedup is None:
            return self.plan
        if self.front is None:
            raise ValueError(f"the plan {self.name} has no other points: leave out speedup")
        return pick(self.plan, self.front, "speedup", speedup)

    @property
    def settings(self) -> dict[str, Any]:
        """The size, steps and guidance that it was made with."""
        return dict(self.plan.provenance.get("settings") or {})

    def forecast(self, spec: JobSpec) -> dict[str, Any]:
        """What the plan expects of a job: seconds, PSNR; empty at other sizes than it was made at."""
        made = self.settings
        asked = spec.settings.to_dict()
        alike = ("height", "width", "num_frames", "steps")
        if not made or any(made.get(name) != asked[name] for name in alike):
            return {}
        return dict(self.at(spec.speedup).forecast)


class Plans(Mapping[str, Served]):
    """Plans by name. Nothing else is ever opened for a request."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._served = {one.name: one for one in served}

    def __getitem__(self, name: str) -> Served:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    @property
    def names(self) -> list[str]:
        """What requests may give, `"dense"` last."""
        return [*self._served, DENSE]

    def named(self, name: str, speedup: float | None) -> Plan | None:
        """The plan to run; None for dense.

        Raises:
            ValueError: If there is no such plan, or no such point of it.
        """
        if name == DENSE:
            if speedup is not None:
                raise ValueError("dense attention has no speed-up to choose: leave out speedup")
            return None
        if name not in self._served:
            raise ValueError(f"plan must be one of {', '.join(self.names)}, got {name!r:.80}")
        return self._served[name].at(speedup)


def load_plans(names: Sequence[str]) -> Plans:
    """Read plans; each is called by the name of its file or folder.

    Args:
        names: Files, folders, built-in names or hub ids.

    Raises:
        ValueError: If one can't be read, or two have the same name.
    """
    served: dict[str, Served] = {}
    for text in names:
        path = find(text)
        file = path / "plan.json" if path.is_dir() else path
        name = _name(text, path)
        if name in served or name == DENSE:
            raise ValueError(f"--plan: two plans are called {name}: rename the file of one")
        beside = front_path(file)
        front = read_front(beside) if beside.is_file() else None
        served[name] = Served(name, Plan.load(path), front)
    return Plans(list(served.values()))


def _name(text: str, path: Path) -> str:
    """`wan-480p` of `plans/wan-480p.json`, of a folder `wan-480p`, of a hub id `owner/wan-480p`."""
    return path.stem if Path(text).is_file() else Path(text.rstrip("/")).name
