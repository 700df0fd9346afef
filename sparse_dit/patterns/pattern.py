"""One head's pattern: a shape, the order and grouping of tokens, sinks and the far field."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from ..curve import Curve
from ..layout import Tile
from ..modalities import MODALITIES
from .blocks import Blocks
from .blockwise import Antidiagonal, Mass, Pooled
from .cluster import Cluster
from .dense import Dense
from .estimated import ByKey, ByQuery, Grid, OwnPart, PooledBlocks, SinkWindow, VerticalSlash
from .fields import CONFIG, Count, Distance, Flag
from .skip import Skip
from .stencil import Stencil
from .stripe import Stripe
from .tile import SlidingTile
from .union import Union
from .vertical import Vertical
from .window import Window

GEOMETRY: dict[str, Any] = {  # what is seen follows from where tokens lie
    "dense": Dense,
    "skip": Skip,
    "window": Window,
    "stripe": Stripe,
    "stencil": Stencil,
    "vertical": Vertical,
    "tile": SlidingTile,
    "blocks": Blocks,
    "union": Union,
}
CAUSAL: dict[str, Any] = {  # what is seen is found anew in each call, for causal language models
    "sink_window": SinkWindow,
    "vertical_slash": VerticalSlash,
    "pooled_blocks": PooledBlocks,
    "grid": Grid,
    "own_part": OwnPart,
    "by_key": ByKey,
    "by_query": ByQuery,
}
BLOCKWISE: dict[str, Any] = {  # blocks of a grid, found in calls and kept for some steps
    "pooled": Pooled,
    "antidiagonal": Antidiagonal,
    "mass": Mass,
    "cluster": Cluster,
}
ESTIMATED = CAUSAL | BLOCKWISE
PATTERNS = GEOMETRY | ESTIMATED
NAMES = {shape: name for name, shape in PATTERNS.items()}

Axis = Annotated[int, Field(strict=True, ge=1, le=1 << 16)] | None


Steps = Annotated[int, Field(strict=True, ge=1, le=64)]


@checked(frozen=True, config=CONFIG)
class _Frame:
    """The parameters that every pattern has beside its shape's own."""

    tile: tuple[Axis, Axis, Axis] = (4, 4, 4)
    cell: Count | None = None
    far: Flag = False
    sink_frames: Distance = 0
    every: Steps = 1
    pool: Count | None = None
    settled_every: Steps = 1


_FRAME = TypeAdapter(_Frame)
_CURVE = TypeAdapter(Curve)
_FIELDS = tuple(field.name for field in dataclasses.fields(_Frame))
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(_Frame)}


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What a head computes, for any layout. Text sees everything and is seen by everything, always.

    Args:
        shape: Which tokens of the grid see which: an instance of a class in `PATTERNS`.
        tile: Frames, rows and columns of the 3-D tiles that tokens are ordered by and queries are
            grouped by, None for a whole axis; or a `Curve`, which the shape then sees as a grid of one row.
        cell: Keys are chosen in runs of at most this many tokens inside a tile; None for whole tiles,
            1 for single tokens. A cell is seen by all tokens of a tile or by none: what the shape
            says is rounded up to that.
        far: Whether cells that aren't seen are represented by their mean key (logit plus log of the
            cell's size) and mean value inside the same softmax.
        sink_frames: The first frames of the video are seen by everyone.
        every: The head is computed at the first step of a stage and at every so many steps from there;
            at the others its output of the step before is taken again.
        pool: With `far`: a pooled key stands for at most this many tokens of a cell; None for whole cells.
        settled_every: For a diffusion language model: tokens that aren't being denoised are computed at the
            first step of a generation and at every so many steps from there. Between, their output is taken
            again; those being denoised, and the last ones before them, see everything. The least of a
            layer's heads holds for all of them.

    Raises:
        ValueError: If a parameter is out of range.
    """

    shape: Any
    tile: Tile = (4, 4, 4)
    cell: int | None = None
    far: bool = False
    sink_frames: int = 0
    every: int = 1
    pool: int | None = None
    settled_every: int = 1

    def __post_init__(self) -> None:
        if type(self.shape) not in NAMES:
            raise ValueError(
                f"a pattern's shape must be one of {sorted(PATTERNS)}, got {self.shape!r}"
            )
        frame = {name: getattr(self, name) for name in _FIELDS}
        if isinstance(self.tile, Curve):
            del frame["tile"]
            if self.sink_frames and self.tile.curve == "video":
                raise ValueError(
                    f"{self.name}: sink_frames must be 0 along a curve through the video, which has "
                    f"no frames, got {self.sink_frames}; use a curve through a frame"
                )
        _checked(_FRAME, frame, self.name)
        if self.pool is not None and not self.far:
            raise ValueError(f"{self.name}: pool must be left out without far, got {self.pool}")
        if self.every > 1 and self.settled_every > 1:
            raise ValueError(f"{self.name}: every and settled_every can't both be above 1")
        given = {k: v for k, v in frame.items() if v != _DEFAULTS[k]}
        if self.is_causal and given:
            raise ValueError(f"{self.name}: takes none of a grid's parameters, got {sorted(given)}")
        if isinstance(self.shape, Cluster) and (order := given.keys() & {"tile", "cell", "pool"}):
            raise ValueError(f"{self.name}: has an order of its own, and takes no {sorted(order)}")

    @property
    def name(self) -> str:
        """Name of the shape, as in plan files."""
        return NAMES[type(self.shape)]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The shapes of a union; else the one shape."""
        return self.shape.of if isinstance(self.shape, Union) else (self.shape,)

    @property
    def is_dense(self) -> bool:
        """Whether everything is computed exactly, at every step."""
        return isinstance(self.shape, Dense) and self.every == self.settled_every == 1

    @property
    def is_estimated(self) -> bool:
        """Whether what is seen is found in queries and keys; see `sparse_dit.estimate`."""
        return self.name in ESTIMATED

    @property
    def is_causal(self) -> bool:
        """Whether that is for language models, in causal order, and in each call anew."""
        return self.name in CAUSAL

    @property
    def computed(self) -> Pattern:
        """What is computed at the steps at which it is."""
        if self.every == self.settled_every == 1:
            return self
        return dataclasses.replace(self, every=1, settled_every=1)

    @property
    def version(self) -> int:
        """The first version of the plan format that can say this."""
        if self.is_estimated or self.settled_every > 1:
            return 3
        reaches = any(isinstance(s, Stencil) and s.reach is not None for s in self.shapes)
        later = isinstance(self.tile, Curve) or self.every > 1 or self.pool is not None or reaches
        return 2 if later else 1

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON form; parameters at their default are left out."""
        data = _shape_to_dict(self.shape)
        for field in dataclasses.fields(_Frame):
            value = getattr(self, field.name)
            if value != field.default:
                data[field.name] = _framed(value)
        return data

    def tensors(self) -> dict[str, Tensor]:
        """What lies beside the plan in safetensors: masks of "blocks" shapes, uint8 `[bytes]`."""
        import torch

        return {
            shape.tensor_name: torch.frombuffer(bytearray(shape.bits), dtype=torch.uint8)
            for shape in self.shapes
            if isinstance(shape, Blocks)
        }

    @staticmethod
    def from_dict(data: Any, tensors: dict[str, Tensor] | None = None) -> Pattern:
        """Inverse of `to_dict`.

        Args:
            data: The JSON object.
            tensors: The plan's tensors, for "blocks".

        Raises:
            ValueError: One line that names what is wrong: an unknown pattern or key, a wrong type.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a pattern must be an object, got {type(data).__name__}")
        shape = _shape_from_dict({k: v for k, v in data.items() if k not in _FIELDS}, tensors or {})
        given = {k: v for k, v in data.items() if k in _FIELDS}
        curve = given.pop("tile") if isinstance(given.get("tile"), dict) else None
        frame = _checked(_FRAME, given, NAMES[type(shape)])
        values = {name: getattr(frame, name) for name in _FIELDS}
        if curve is not None:
            values["tile"] = _checked(_CURVE, curve, f"{NAMES[type(shape)]}: tile")
        return Pattern(shape, **values)

    def __str__(self) -> str:
        extra = {k: v for k, v in self.to_dict().items() if k not in ("name", "tile")}
        if isinstance(self.shape, Stencil):
            extra["offsets"] = sum(run[3] for run in self.shape.offsets)
        for name in ("cells", "of"):
            if name in extra:
                extra[name] = len(extra[name])
        extra.pop("mask", None)
        tile = tile_text(self.tile)
        own_order = self.is_dense or self.is_causal or isinstance(self.shape, Cluster)
        words = [self.name] if own_order else [self.name, tile]
        return " ".join(words + [f"{k}={v}".replace(" ", "") for k, v in extra.items()])


def tile_text(tile: Tile) -> str:
    """`4x4x4`, `allx8x1`, or a curve's words."""
    if isinstance(tile, Curve):
        return str(tile)
    return "x".join("all" if n is None else str(n) for n in tile)


def _framed(value: Any) -> Any:
    if isinstance(value, Curve):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _shape_to_dict(shape: Any) -> dict[str, Any]:
    name = NAMES[type(shape)]
    if isinstance(shape, Union):
        return {"name": name, "of": [_shape_to_dict(part) for part in shape.of]}
    if isinstance(shape, Blocks):
        return {"name": name, "lattice": list(shape.lattice), "mask": shape.tensor_name}
    data: dict[str, Any] = {"name": name}
    if isinstance(shape, ByKey | ByQuery):
        parts = {modality: getattr(shape, modality) for modality in MODALITIES}
        return data | {m: _shape_to_dict(part) for m, part in parts.items() if part != Dense()}
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            data[field.name] = _listed(value)
    return data


def _listed(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _listed(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _shape_from_dict(data: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    parameters = dict(data)
    name = parameters.pop("name", None)
    if not isinstance(name, str) or name not in PATTERNS:
        raise ValueError(f"unknown pattern {str(name)[:40]!r}; expected one of {sorted(PATTERNS)}")
    if name == "union":
        if set(parameters) != {"of"} or not isinstance(parameters["of"], list):
            raise ValueError(f"union: takes 'of', a list of shapes, got {sorted(parameters)}")
        parts = parameters["of"]
        if not 2 <= len(parts) <= 16 or any(not isinstance(p, dict) for p in parts):
            raise ValueError("union: 'of' must hold 2 to 16 shapes")
        if any(part.get("name") == "union" for part in parts):
            raise ValueError("union: a union can't hold a union")
        return Union(tuple(_shape_from_dict(part, tensors) for part in parts))
    if name in ("by_key", "by_query"):
        parts = {m: v for m, v in parameters.items() if m in MODALITIES and isinstance(v, dict)}
        parameters |= {m: _shape_from_dict(part, tensors) for m, part in parts.items()}
    if name == "blocks":
        mask = parameters.pop("mask", None)
        if not isinstance(mask, str) or mask not in tensors:
            raise ValueError(f"blocks: no tensor {str(mask)[:40]!r} beside the plan")
        parameters["bits"] = bytes(tensors[mask].tolist())
    return _checked(TypeAdapter(PATTERNS[name]), parameters, name)


def _checked(adapter: TypeAdapter[Any], data: dict[str, Any], name: str) -> Any:
    """Validate, and turn pydantic's report into one line."""
    if any(not isinstance(key, str) for key in data):
        raise ValueError(f"{name}: parameter names must be strings")
    if any(isinstance(v, float) and not math.isfinite(v) for v in data.values()):
        raise ValueError(f"{name}: parameters must be finite")
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=True)[0]
        place = ".".join(str(part) for part in first["loc"])
        got = str(first.get("input"))[:60]
        raise ValueError(f"{name}: {place}: {first['msg']}, got {got}") from None
