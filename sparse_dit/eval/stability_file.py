"""What a comparison of calibration prompts asks for and finds, and its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..generation import Case, GenerationSettings
from ..outputs import Outputs
from ..search.sensitivity import Sensitivity
from ..texts import read_text
from ..whole_file import write_text
from ..words import option

FORMAT = "sparse_dit stability 3"
COUNTS = (1, 2, 4)


@dataclass(frozen=True)
class StabilityRequest:
    """What to compare.

    Args:
        calibration: Cases; plans are made from the first ones of them.
        held_out: Cases that plans are judged on.
        settings: Size, steps and guidance.
        file: JSON of the result; one that is there is gone on with.
        counts: How many calibration cases each plan is made from, rising; all plans are compared with the
            last one.
        density: The density of every plan, in (0, 1).
        profile_steps: How many noise levels are profiled.
        rows: Sampled query rows for each head, layer, step and case.
        generate: Also generate the held-out cases with every plan.
        repeats: Searches of the same settings that are compared, from the most cases; below 2 none.

    Raises:
        ValueError: If anything is out of range, or a prompt is in both lists.
    """

    calibration: Sequence[Case]
    held_out: Sequence[Case]
    settings: GenerationSettings
    file: Path
    counts: Sequence[int] = COUNTS
    density: float = 0.3
    profile_steps: int = 4
    rows: int = 64
    generate: bool = False
    repeats: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ValueError(
                f"{option('density')} must be between 0 and 1, got {self.density}; try 0.3"
            )
        if list(self.counts) != sorted(set(self.counts)) or not self.counts or self.counts[0] < 1:
            raise ValueError(
                f"{option('counts')} must be whole numbers >= 1 that rise, got {self.counts}"
            )
        if len(self.calibration) < self.counts[-1]:
            raise ValueError(
                f"{option('calibration')} must hold {self.counts[-1]} prompts, got "
                f"{len(self.calibration)}; give more, or smaller {option('counts')}"
            )
        if not self.held_out:
            name = option("held_out")
            raise ValueError(f"judging needs at least one held-out prompt, got none; give {name}")
        if shared := {c.prompt for c in self.calibration} & {c.prompt for c in self.held_out}:
            raise ValueError(
                f"held-out prompts must not be calibration prompts, got both: {sorted(shared)[:3]}"
            )

    @property
    def profiles(self) -> Path:
        """Folder of the profile files."""
        return self.file.with_name(f"{self.file.stem}.profiles")

    def conditions(self, part_hash: str) -> dict[str, Any]:
        """What a file's rows depend on."""
        return {
            "model": part_hash,
            "settings": self.settings.to_dict(),
            "calibration": [[c.prompt, c.seed] for c in self.calibration[: self.counts[-1]]],
            "held_out": [[c.prompt, c.seed] for c in self.held_out],
            "counts": list(self.counts),
            "density": self.density,
            "profile_steps": self.profile_steps,
            "rows": self.rows,
            "repeats": self.repeats,
        }


@dataclass(frozen=True)
class StabilityRow:
    """A plan from some prompts, against the one from the most.

    Attributes:
        prompts: How many prompts it was calibrated with.
        density: Its mean density over heads and noise levels.
        expected_error: The relative error of its heads by its own profile; see `Choice.error`.
        held_out_error: The same, measured on the held-out prompts: root of the mean square over them.
        loss: Forecast mean squared change of held-out videos, before a run corrects it; in units of
            that of the plan from the most prompts.
        same_pattern: Share of the heads that have the very pattern of the plan from the most prompts.
        same_kind: Share whose pattern is of the same shape and token order, with the far field or not.
        near_density: Share whose density is within a factor of 1.25.
        psnr_db: Mean PSNR of the held-out videos against dense ones; None if they weren't generated.
        psnr_least_db: That of the worst of them.
    """

    prompts: int
    density: float
    expected_error: float
    held_out_error: float
    loss: float
    same_pattern: float
    same_kind: float
    near_density: float
    psnr_db: float | None = None
    psnr_least_db: float | None = None


@dataclass(frozen=True)
class RepeatRow:
    """The plan of one of several searches of the same settings.

    Attributes:
        density: Its mean density over heads and noise levels.
        expected_error: The relative error of its heads by its own profile; see `Choice.error`.
        same_pattern: Share of the heads that have the very pattern of the first search's plan.
        psnr: PSNR of each held-out video against the dense one; None if they weren't generated.
    """

    density: float
    expected_error: float
    same_pattern: float
    psnr: list[float] | None = None


@dataclass
class StabilityState:
    """What has been measured so far, and its file.

    Args:
        file: The path of the JSON file.
        conditions: What was asked for, see `StabilityRequest.conditions`.
        sensitivity: How sensitive the video is to errors; None before it was measured.
        rows: One row for each plan; empty before the plans were judged.
        repeats: One row for each search of the same settings; empty before they were made.
        outputs: Writes the file, and says so if it must be written to another place.
    """

    file: Path
    conditions: dict[str, Any]
    sensitivity: Sensitivity | None
    rows: list[StabilityRow]
    repeats: list[RepeatRow] = field(default_factory=list)
    outputs: Outputs = field(default_factory=lambda: Outputs(replace=True, say=print))

    @staticmethod
    def started(request: StabilityRequest, part_hash: str) -> StabilityState:
        """What the file holds; empty if it isn't there. ValueError if it is of something else."""
        state = StabilityState(request.file, request.conditions(part_hash), None, [])
        if not request.file.exists():
            return state
        try:
            data = json.loads(read_text(request.file))
            known, same = data["format"] == FORMAT, data["conditions"] == state.conditions
            if known and same:
                weights = data["sensitivity"]
                state.sensitivity = Sensitivity(**weights) if weights else None
                state.rows = [StabilityRow(**row) for row in data["rows"]]
                state.repeats = [RepeatRow(**row) for row in data["repeats"]]
        except (ValueError, LookupError, TypeError):
            known, same = False, False
        if not known:
            raise ValueError(f"{request.file} is no stability file; name another")
        if not same:
            raise ValueError(
                f"{request.file} holds rows of another model, other prompts or settings; "
                "name another file"
            )
        return state

    def write(self) -> None:
        """Write the file, whole or not at all; to another place, and say so, if it must be."""
        data = {
            "format": FORMAT,
            "conditions": self.conditions,
            "sensitivity": asdict(self.sensitivity) if self.sensitivity else None,
            "rows": [asdict(row) for row in self.rows],
            "repeats": [asdict(row) for row in self.repeats],
        }
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        self.outputs.put(self.file, lambda path: write_text(path, text))
