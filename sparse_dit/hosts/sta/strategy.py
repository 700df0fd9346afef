"""STA strategy files, `{step}_{layer}_{head}: [frames, rows, columns]` in tiles of 6x8x8 tokens.

SGLang's `sliding_tile_attn` and sparsevideo load them.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ...plan import PlanError
from ...plan.document import parse
from ...plan.errors import short
from ...plan.storage import read, usable
from ...whole_file import write_text
from .windows import GridSize

MAX_BYTES = 64 << 20
MAX_WINDOW = 1 << 16
MAX_NUMBER = 10**6  # of steps, layers and heads: what `KEY` can number
MAX_WINDOWS = 1 << 20  # what `MAX_BYTES` hold with the longest keys
KEY = re.compile(r"(0|[1-9]\d{0,5})_(0|[1-9]\d{0,5})_(0|[1-9]\d{0,5})")


@dataclass(frozen=True)
class Strategy:
    """What a strategy file says.

    Args:
        windows: For each step, layer and head the window, in tiles on each axis.

    Raises:
        ValueError: If there is nothing, or not each step has the same layers and heads.
    """

    windows: tuple[tuple[tuple[GridSize, ...], ...], ...]

    def __post_init__(self) -> None:
        layers = {len(step) for step in self.windows}
        heads = {len(layer) for step in self.windows for layer in step}
        if len(layers) != 1 or len(heads) != 1 or 0 in layers | heads:
            raise ValueError(
                "a strategy must have the same layers and heads at each step, at least one of each"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of steps, layers and heads."""
        return len(self.windows), len(self.windows[0]), len(self.windows[0][0])

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Strategy:
        """Read a strategy file and check all of it.

        Raises:
            PlanError: If it can't be read, a key or window is none, or one is missing.
        """
        file = usable(path)
        data = read(file, MAX_BYTES)
        try:
            return Strategy.from_dict(parse(data, what="an STA strategy"))
        except ValueError as error:
            raise PlanError(f"{file}: {error}") from None

    @staticmethod
    def from_dict(data: object) -> Strategy:
        """Inverse of `to_dict`.

        Raises:
            ValueError: See `load`.
        """
        if not isinstance(data, dict) or not data:
            raise ValueError(
                f"an STA strategy must be a JSON object with a window for each step, layer and head, "
                f"got {short(data)}"
            )
        found: dict[tuple[int, ...], GridSize] = {}
        for key, value in data.items():
            match = KEY.fullmatch(key)
            if match is None:
                raise ValueError(f"a key must be STEP_LAYER_HEAD, as in '0_12_3', got {short(key)}")
            found[tuple(int(n) for n in match.groups())] = _window(key, value)
        steps, layers, heads = (max(axis) + 1 for axis in zip(*found, strict=True))
        if len(found) != steps * layers * heads:
            places = ((t, x, h) for t in range(steps) for x in range(layers) for h in range(heads))
            missing = "_".join(map(str, next(p for p in places if p not in found)))
            raise ValueError(
                f"there must be a window for each of {steps} steps, {layers} layers and {heads} heads, "
                f"got {len(found)}; the first that is missing is {missing!r}"
            )
        return Strategy(
            tuple(
                tuple(tuple(found[t, x, h] for h in range(heads)) for x in range(layers))
                for t in range(steps)
            )
        )

    def to_dict(self) -> dict[str, list[int]]:
        """The JSON document."""
        return {
            f"{t}_{x}_{h}": list(window)
            for t, step in enumerate(self.windows)
            for x, layer in enumerate(step)
            for h, window in enumerate(layer)
        }

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the strategy file, whole or not at all.

        Raises:
            PlanError: If something is there and `overwrite` is False.
        """
        file = Path(path)
        if file.exists() and not overwrite:
            raise PlanError(f"{file}: exists already; give another name, or overwrite it")
        write_text(file, json.dumps(self.to_dict(), indent=0) + "\n")


def _window(key: str, value: object) -> GridSize:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(
        isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_WINDOW for n in numbers
    ):
        raise ValueError(f"{key}: a window must be three whole numbers >= 1, got {short(value)}")
    frames, rows, columns = numbers
    return frames, rows, columns
