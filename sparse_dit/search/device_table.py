"""What attention costs on a device, measured once and kept in a file: a cost table at any size, anywhere.

A plan can be searched on one machine for another: its table gives the seconds of heads there.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..environment import cpu_name
from ..layout import TokenLayout
from ..plan.document import place
from ..plan.errors import PlanError, short
from ..plan.schema import MAX_HEAD_DIM, MAX_HEADS, MAX_TOKENS
from ..plan.storage import read
from ..resources import shipped
from ..texts import decoded
from ..whole_file import write_text
from .cost import CostTable, rising

MAX_BYTES = 4 << 20
REACH = (
    2.0  # tokens beyond the least and most measured: pairs are taken to cost the same up to here
)
SLUG = r"[a-z0-9]+([._-][a-z0-9]+)*"

Seconds = Annotated[float, Field(gt=0, le=1e6)]
Points = Annotated[
    tuple[tuple[Annotated[float, Field(gt=0, le=1.5)], Seconds], ...],
    Field(min_length=1, max_length=256),
]
Side = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Text = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Entry(_Form):
    """Seconds of one head in one attention call at one size, batch 1.

    Args:
        grid: Frames, rows and columns of the video; there is no text.
        head_dim, dtype: The channels and the dtype of q, k and v.
        dense, dense_head: What PyTorch's dense attention takes, and the sparse backend's.
        masked, far_field: Pairs of density and seconds, rising, without and with the far field.
        index: What the first call of a pattern takes longer, as its index is built; None if unknown.
        permute: Bringing q, k and v into the order of tiles and the output back, on its own; it is
            contained in the seconds above. None if unknown.
    """

    grid: tuple[Side, Side, Side]
    head_dim: Annotated[int, Field(ge=1, le=MAX_HEAD_DIM)]
    dtype: Dtype
    dense: Seconds
    dense_head: Seconds
    masked: Points
    far_field: Points
    index: Annotated[float, Field(ge=0, le=1e6)] | None = None
    permute: Seconds | None = None

    @field_validator("grid")
    @classmethod
    def _not_too_long(cls, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        if math.prod(grid) > MAX_TOKENS:
            raise ValueError(f"must hold at most {MAX_TOKENS} tokens")
        return grid

    @field_validator("masked", "far_field")
    @classmethod
    def _ascending(cls, points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        if any(a[0] >= b[0] or a[1] > b[1] for a, b in itertools.pairwise(points)):
            raise ValueError("must ascend in density, with seconds that never fall")
        return points

    @property
    def tokens(self) -> int:
        """The number of tokens of the sequence."""
        return math.prod(self.grid)

    def seconds(self, far: bool, density: float) -> float:
        """Interpolated in density; beyond the last point in proportion."""
        densities, seconds = zip(*(self.far_field if far else self.masked), strict=True)
        if density > densities[-1]:
            return seconds[-1] * density / densities[-1]
        return float(np.interp(density, densities, seconds))


class DeviceTable(_Form):
    """What `sparse-dit bench cost` measured on a device.

    Args:
        version: The version of the file format.
        name: A slug of the device, as its file is called.
        device: `"cpu"`, `"cuda"`, ...
        processor: Its maker's name for it.
        threads: The number of CPU threads.
        backend: Sparse backend that was timed.
        heads: Heads of the calls that were timed.
        environment: Versions, readable text by name.
        foreign_cores: Mean number of cores that others used meanwhile; None if that isn't known.
        entries: Sizes that were measured.
        caveat: What must be told wherever it is used, if it wasn't measured but estimated.
    """

    version: Literal[1] = 1
    name: Annotated[str, Field(pattern=rf"^{SLUG}$", max_length=128)]
    device: Annotated[str, Field(pattern=r"^[a-z]+$", max_length=16)]
    processor: Text
    threads: Annotated[int, Field(ge=1, le=4096)]
    backend: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
    heads: Annotated[int, Field(ge=1, le=MAX_HEADS)]
    environment: dict[Text, Text] = {}
    foreign_cores: Annotated[float, Field(ge=0)] | None = None
    entries: Annotated[tuple[Entry, ...], Field(min_length=1, max_length=4096)]
    caveat: Annotated[str, Field(max_length=2048)] | None = None

    @property
    def here(self) -> bool:
        """Whether it is of this machine, with as many threads as torch uses now."""
        return self.name == slug(self.device)

    def save(self, path: Path) -> None:
        """Write JSON, making the folder; the file appears whole or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(name: str | os.PathLike[str]) -> DeviceTable:
        """Read a table by path, or by the name of one that ships with the package (`nvidia-h200`, `h100`).

        Raises:
            ValueError: If there is none, or it is not a valid table; one line with the place.
        """
        path = _find(name)
        data = read(path, MAX_BYTES)
        try:
            return DeviceTable.model_validate_json(decoded(data))
        except ValidationError as error:
            raise PlanError(f"{path}: {_explain(error)}") from None
        except ValueError as error:  # of decoding
            raise PlanError(f"{path}: {error}") from None

    def at(self, layout: TokenLayout, head_dim: int, dtype: str) -> CostTable:
        """Costs at any size: seconds a pair of tokens, interpolated over the logarithm of the tokens.

        Args:
            layout: Size that is wanted; only its number of tokens counts.
            head_dim, dtype: Must have been measured.

        Raises:
            ValueError: If they were not, or the size is more than twice beyond what was measured.
        """
        low, high, share = self._around(layout.seq_len, head_dim, dtype)

        def mixed(a: float, b: float) -> float:
            pairs = (1 - share) * a / low.tokens**2 + share * b / high.tokens**2
            return pairs * layout.seq_len**2

        sparse = {far: _mixed_points(low, high, far, mixed) for far in (False, True)}
        index = None
        if low.index is not None and high.index is not None:
            index = mixed(low.index, high.index)
        return CostTable(
            layout,
            mixed(low.dense, high.dense),
            sparse,
            self.backend,
            self.threads,
            self.device,
            dtype,
            mixed(low.dense_head, high.dense_head),
            index,
            self.name,
        )

    def check(self, head_dim: int, dtype: str) -> None:
        """Raise ValueError unless such heads were measured."""
        if not self._sizes(head_dim, dtype):
            kinds = sorted({(e.head_dim, e.dtype) for e in self.entries})
            known = ", ".join(f"{d} {t}" for d, t in kinds)
            raise ValueError(
                f"the device table {self.name} must have head_dim {head_dim} {dtype}, it has "
                f"{known}; measure it there: sparse-dit bench cost --head-dim {head_dim} "
                f"--dtype {dtype}"
            )

    def covers(self, tokens: int, head_dim: int, dtype: str) -> bool:
        """Whether `at` can answer."""
        sizes = self._sizes(head_dim, dtype)
        return bool(sizes) and sizes[0].tokens / REACH <= tokens <= sizes[-1].tokens * REACH

    def _sizes(self, head_dim: int, dtype: str) -> list[Entry]:
        """Entries of a kind, by rising tokens."""
        kind = [e for e in self.entries if (e.head_dim, e.dtype) == (head_dim, dtype)]
        return sorted(kind, key=lambda entry: entry.tokens)

    def _around(self, tokens: int, head_dim: int, dtype: str) -> tuple[Entry, Entry, float]:
        """The measured sizes on both sides, and the second one's share."""
        self.check(head_dim, dtype)
        entries = self._sizes(head_dim, dtype)
        least, most = entries[0].tokens, entries[-1].tokens
        if not self.covers(tokens, head_dim, dtype):
            raise ValueError(
                f"the device table {self.name} was measured from {least} to {most} tokens, and "
                f"tells nothing of {tokens}; measure there: sparse-dit bench cost --tokens {tokens}"
            )
        above = next((n for n, e in enumerate(entries) if e.tokens >= tokens), len(entries) - 1)
        low, high = entries[max(0, above - 1)], entries[above]
        if low.tokens == high.tokens:
            return low, high, 0.0
        share = math.log(min(tokens, high.tokens) / low.tokens) / math.log(high.tokens / low.tokens)
        return low, high, share


def slug(device: str) -> str:
    """Name of this machine's table: processor and, for a CPU, torch's threads."""
    if device == "cuda" and torch.cuda.is_available():
        words = torch.cuda.get_device_name()
    else:
        count = torch.get_num_threads()
        words = f"{processor(device)} {count} thread{'s' if count > 1 else ''}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:128] or "unknown"


def processor(device: str) -> str:
    """What its maker calls the processor."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu_name() or "unknown"


def shipped_tables() -> Sequence[str]:
    """Names of the tables that ship with the package."""
    try:
        return sorted(path.stem for path in (shipped("profiles") / "devices").glob("*.json"))
    except FileNotFoundError:
        return []


def _find(name: str | os.PathLike[str]) -> Path:
    text = os.fspath(name)
    if re.fullmatch(SLUG, text) and text in shipped_tables():
        return shipped("profiles") / "devices" / f"{text}.json"
    path = Path(text)
    if "\0" in text or not path.exists():
        raise PlanError(
            f"no device table {short(text)}: must be a file that exists, or one that ships here: "
            f"{', '.join(shipped_tables()) or 'none'}; sparse-dit bench cost measures one"
        )
    return path


def _mixed_points(
    low: Entry, high: Entry, far: bool, mixed: Callable[[float, float], float]
) -> tuple[tuple[float, float], ...]:
    """Points of the densities that both have, or of the nearest that do."""
    own = [[d for d, _ in (e.far_field if far else e.masked)] for e in (low, high)]
    least, most = max(d[0] for d in own), min(d[-1] for d in own)
    densities = sorted({d for d in own[0] + own[1] if least <= d <= most} or {least})
    return rising([(d, mixed(low.seconds(far, d), high.seconds(far, d))) for d in densities])


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"not valid JSON ({first['msg'].removeprefix('Invalid JSON: ')}); is it complete?"
    where = place(first["loc"]) if first["loc"] else "device table"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key; remove it, or use a newer sparse_dit"
    if first["type"] == "missing":
        return f"{where}: missing; is this file a device table?"
    reason = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    reason = reason.replace("String should", "must", 1).replace("should", "must", 1)
    return f"{where}: {reason}, got {short(first['input'])}"
