"""The device that a plan is searched for on another machine: its attention by its device table, the rest of
a generation as the user says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..integrations import heads_of
from ..layout import TokenLayout
from ..words import option
from .cost import CostTable
from .device_table import DeviceTable, slug


@dataclass(frozen=True)
class TargetDevice:
    """A device that a plan is searched for, which may be another than the one that searches.

    Args:
        table: What attention costs on the target device.
        dense_seconds: The seconds that one dense generation takes on the target device. None if the table is
            of this machine, where they are measured.

    Raises:
        ValueError: If `dense_seconds` is None for another machine's table, or no finite number above 0.
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
    ) -> TargetDevice | None:
        """The target device that a user names; None without a table, as everything is then measured here.

        Raises:
            ValueError: If `dense_seconds` is given without a table, or is missing or out of range.
        """
        if table is None:
            if dense_seconds is not None:
                raise ValueError(
                    f"{option('dense_seconds')} is for a device table: give {option('device_table')} too, "
                    "or leave it out"
                )
            return None
        return TargetDevice(
            table if isinstance(table, DeviceTable) else DeviceTable.load(table), dense_seconds
        )

    def check(self, transformer: Any) -> None:
        """Raise ValueError unless the table has every head_dim of a transformer, at its dtype."""
        dtype = str(transformer.dtype).removeprefix("torch.")
        for head_dim in {head_dim for _, head_dim in heads_of(transformer).values()}:
            self.table.check(head_dim, dtype)

    def cost(self, layout: TokenLayout, head_dim: int, dtype: torch.dtype) -> CostTable:
        """The costs of heads on the target device, at one token layout, head_dim and dtype."""
        return self.table.at(layout, head_dim, str(dtype).removeprefix("torch."))

    def smaller(self, head_dim: int, dtype: str) -> Callable[[TokenLayout], CostTable | None]:
        """A function that gives the costs at another token layout, or None if the table doesn't cover it."""

        def at(layout: TokenLayout) -> CostTable | None:
            covered = self.table.covers(layout.seq_len, head_dim, dtype)
            return self.table.at(layout, head_dim, dtype) if covered else None

        return at

    def generation(self, measured: float, stock: float) -> float:
        """The seconds that a dense generation takes on the target device.

        Args:
            measured: The seconds that it takes on this machine.
            stock: The seconds that its dense attention takes by the table.

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
