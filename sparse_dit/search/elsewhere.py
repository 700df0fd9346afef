"""Searching a plan on one machine for another: attention by that one's table, the rest as its user says."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..integrations.diffusers import heads_of
from ..layout import TokenLayout
from ..words import option
from .cost import CostTable
from .device_table import DeviceTable, slug


@dataclass(frozen=True)
class Elsewhere:
    """A device that a plan is searched for on another one.

    Args:
        table: What attention costs there.
        dense_seconds: Of one dense generation there; None if the table is of this machine.

    Raises:
        ValueError: If it isn't known and can't be measured here, or is no number above 0.
    """

    table: DeviceTable
    dense_seconds: float | None

    def __post_init__(self) -> None:
        seconds = self.dense_seconds
        if seconds is None and not self.table.here:
            raise ValueError(
                f"the device table {self.table.name} is of another machine ({slug(self.table.device)} "
                f"is this one): give {option('dense_seconds')}, what one dense generation at these "
                "settings takes there; attention is only a part of it"
            )
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            name = option("dense_seconds")
            raise ValueError(f"{name} must be a finite number above 0, got {seconds!r}")

    @staticmethod
    def of(
        table: str | os.PathLike[str] | DeviceTable | None, dense_seconds: float | None
    ) -> Elsewhere | None:
        """From what a user gives; None if no table is given, as everything is then measured here."""
        if table is None:
            if dense_seconds is not None:
                raise ValueError(
                    f"{option('dense_seconds')} is for a device table: give {option('device_table')} too, "
                    "or leave it out"
                )
            return None
        return Elsewhere(
            table if isinstance(table, DeviceTable) else DeviceTable.load(table), dense_seconds
        )

    def check(self, transformer: Any) -> None:
        """Raise ValueError unless the table has a transformer's head_dim and dtype."""
        dtype = str(transformer.dtype).removeprefix("torch.")
        self.table.check(heads_of(transformer)[1], dtype)

    def cost(self, layout: TokenLayout, head_dim: int, dtype: torch.dtype) -> CostTable:
        """Costs of heads there."""
        return self.table.at(layout, head_dim, str(dtype).removeprefix("torch."))

    def smaller(self, head_dim: int, dtype: str) -> Callable[[TokenLayout], CostTable | None]:
        """Gives the costs at other sizes, None beyond what the table covers."""

        def at(layout: TokenLayout) -> CostTable | None:
            covered = self.table.covers(layout.seq_len, head_dim, dtype)
            return self.table.at(layout, head_dim, dtype) if covered else None

        return at

    def generation(self, measured: float, stock: float) -> float:
        """Seconds of a dense generation there.

        Args:
            measured: On this machine.
            stock: Seconds of its dense attention by the table.

        Raises:
            ValueError: If the whole is less than its attention.
        """
        if self.dense_seconds is None:
            return measured
        if self.dense_seconds < stock:
            raise ValueError(
                f"{option('dense_seconds')} must be at least the {stock:.4g} s that dense attention alone "
                f"takes by the device table {self.table.name}, got {self.dense_seconds:g}; is it the time of "
                "a generation with these settings on that device?"
            )
        return self.dense_seconds
