"""Learned plans in the user's cache folder: one file for each model, size, device and objective."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock, Timeout
from torch import nn

from ..fingerprint import fingerprint
from ..plan import Plan, PlanError
from .learner import Learner

logger = logging.getLogger("sparse_dit")

VARIABLE = "SPARSE_DIT_CACHE"  # names another folder
PROFILE = ".profile.safetensors"  # how the file's name ends that a plan is refined from


@dataclass(frozen=True)
class Kept:
    """A plan in the store: its name, its file, and the plan."""

    name: str
    file: Path
    plan: Plan


class PlanStore:
    """Plans in a folder. Whatever is wrong with it costs what would be kept there, and one logged line.

    Args:
        folder: Where; made when something is kept. None for the user's cache folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        given = os.environ.get(VARIABLE) if folder is None else os.fspath(folder)
        self.folder = Path(given) if given else platformdirs.user_cache_path("sparse_dit") / "plans"
        self._told = False

    def find(self, name: str) -> Plan | None:
        """The plan of a name; None if there is none, or it can't be read."""
        file = self.file(name)
        try:
            return Plan.load(file) if file.is_file() else None
        except (PlanError, OSError) as error:
            self._tell(f"a learned plan can't be read and is learned again ({error})")
            return None

    def keep(self, name: str, plan: Plan | None, learner: Learner | None = None) -> None:
        """Write a plan, unless another process is writing one of that name now.

        Args:
            name: The plan's name.
            plan: What is written; None if it isn't made yet.
            learner: What it is made from, if that is to be refined; it is written too.
        """
        file, profile = self.file(name), self._profile(name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock", timeout=0):
                if plan is not None:
                    plan.save(file, overwrite=True)
                if learner is None or not learner.write(profile):
                    profile.unlink(missing_ok=True)
        except Timeout:
            return
        except OSError as error:
            self._tell(f"a learned plan can't be kept ({error}); it is learned again next time")

    def learner(self, name: str, modules: Mapping[str, nn.Module]) -> Learner | None:
        """What goes on learning for a plan; None if it is learned, or what it was made from can't be read.

        Args:
            name: The plan's name.
            modules: The transformers, by component name.
        """
        file = self._profile(name)
        try:
            return Learner.read(file, modules) if file.is_file() else None
        except PlanError as error:
            self._tell(f"what was learned can't be read and is learned again ({error})")
            return None

    def file(self, name: str) -> Path:
        """Where the plan of a name lies."""
        return self.folder / f"{name}.json"

    def _profile(self, name: str) -> Path:
        return self.folder / f"{name}{PROFILE}"

    def __iter__(self) -> Iterator[Kept]:
        """All plans that can be read, by name."""
        for name in self.names():
            if (plan := self.find(name)) is not None:
                yield Kept(name, self.file(name), plan)

    def names(self) -> list[str]:
        """The names of all plans, also of those that can't be read or aren't made yet."""
        profiles = {file.name.removesuffix(PROFILE) for file in self.folder.glob(f"*{PROFILE}")}
        return sorted(profiles | {file.stem for file in self.folder.glob("*.json")})

    def remove(self, name: str) -> None:
        """Delete a plan.

        Raises:
            ValueError: If there is none of that name.
        """
        file = self.file(name)
        if name not in self.names():
            raise ValueError(f"{self.folder} has no plan {name!r}; `sparse-dit plans` lists them")
        for path in (file.with_suffix(".safetensors"), self._profile(name), file):
            path.unlink(missing_ok=True)
        Path(f"{file}.lock").unlink(missing_ok=True)

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            logger.warning("%s", text)


def plan_name(modules: Mapping[str, nn.Module], size: int, objective: Mapping[str, float]) -> str:
    """The name of a plan: model, size and a hash of all that it depends on.

    Args:
        modules: The transformers, by component name.
        size: The class of the size, see `size_class`.
        objective: What is asked for.
    """
    first = next(iter(modules.values()))
    device = next(first.parameters()).device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    parts = [fingerprint(modules), str(size), kind, str(threads), json.dumps(dict(objective))]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return re.sub(r"[^\w.-]", "-", f"{type(first).__name__}-{tokens_of(size)}-{digest}")


def size_class(tokens: int) -> int:
    """A number that lengths share which differ by less than a factor of 1.19 from its middle."""
    return round(2 * math.log2(tokens))


def tokens_of(size: int) -> int:
    """The middle of a class of lengths."""
    return round(2 ** (size / 2))
