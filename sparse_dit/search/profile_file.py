"""A profile as one safetensors file: written atomically, by one process at a time, checked when read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..curve import Curve
from ..generation import Case, GenerationSettings
from ..layout import KINDS, OLD_KINDS, Tile, TokenLayout
from ..outputs import check_writable
from ..timing import Taken
from ..words import option
from .candidates import tilings
from .profile import HALF, LATER, ComponentProfile, Profile
from .ranking import BEYOND, whole_beyond
from .statistics import COUNT, compared_shapes, layer_shapes, statistics_shapes
from .tensor_file import Whole, read_tensors, write_tensors
from .verify import Reference

VIDEO = "reference|video"
FORMAT = "sparse_dit profile 8"  # counts up when candidates change too: scores go by their place
PER_HEAD_FORMAT = (
    "sparse_dit profile 7"  # what all heads, or all levels, share stands there for each
)
OLD_FORMAT = (
    "sparse_dit profile 6"  # also one number of heads for all layers; other names of segments
)
KINDS_OF_TENSORS = ("found", "beyond", "scores", "looks", "pictures")
SCORES = {"error": 2, "error_squared": 2, "recall": 2, "norm": 1, "rows": 1}  # dimensions


def write_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile; the file appears whole or not at all."""
    tensors = {}
    header = {
        "settings": profile.settings.to_dict(),
        "rows": profile.rows,
        "done": profile.done,
        "seconds": profile.seconds,
    }
    if (reference := profile.reference) is not None:
        tensors[VIDEO] = torch.from_numpy(reference.output)
        header["reference"] = {
            "prompt": reference.case.prompt,
            "seed": reference.case.seed,
            "seconds": reference.taken.seconds,
            "wall": reference.taken.wall,
            "forwards": reference.forwards,
            "attention": reference.attention,
        }
    write_parts(profile.components, Path(path), FORMAT, header, tensors)


def write_parts(
    parts: Mapping[str, ComponentProfile],
    path: Path,
    version: str,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write profiles of transformers with something else; the file appears whole or not at all.

    Args:
        parts: By component name.
        path: The file.
        version: What the file says that it is.
        header: What else belongs to it, JSON-ready.
        tensors: Likewise, by name.
    """
    every, described = dict(tensors or {}), {}
    for name, part in parts.items():
        every.update(_tensors_of(name, part))
        described[name] = {
            "model_class": part.model_class,
            "config_hash": part.config_hash,
            "heads": part.heads,
            "layout": part.layout and part.layout.to_dict(),
            "sigmas": part.sigmas,
            "layers": part.layers,
        }
    write_tensors(path, version, {"components": described, **header}, every)


def size_of(part: ComponentProfile) -> int:
    """The bytes that a transformer's profile takes in a file."""
    layers = (*part.found.values(), *part.beyond.values())
    found = (statistics for orders in layers for statistics in orders.values())
    fields = (*found, *part.scores.values(), *part.looks.values(), part.pictures)
    return sum(tensor.nbytes for values in fields for tensor in values.values())


def _tensors_of(name: str, part: ComponentProfile) -> dict[str, Tensor]:
    tensors = {}
    for (level, layer), orders in part.found.items():
        for tile, statistics in orders.items():
            for key, value in statistics.items():
                tensors[f"found|{name}|{level}|{layer}|{_tile_text(tile)}|{key}"] = value
    for layer, orders in part.beyond.items():
        for tile, statistics in orders.items():
            for key, value in statistics.items():
                tensors[f"beyond|{name}|{layer}|{_tile_text(tile)}|{key}"] = value
    for (level, layer), scores in part.scores.items():
        for key, value in scores.items():
            tensors[f"scores|{name}|{level}|{layer}|{key}"] = value
    for (kind, level, layer), looks in part.looks.items():
        for key, value in looks.items():
            tensors[f"looks|{name}|{kind}|{level}|{layer}|{key}"] = value
    for (layer, tile), value in part.pictures.items():
        tensors[f"pictures|{name}|{layer}|{_tile_text(tile)}"] = value
    return tensors


def read_profile(path: str | Path) -> Profile:
    """Inverse of `write_profile`.

    Raises:
        PlanError: If the file is missing, damaged, or no profile; in one line.
    """
    return read_parts(Path(path), (FORMAT, PER_HEAD_FORMAT, OLD_FORMAT), _restored)


def read_parts(
    path: Path,
    versions: Sequence[str],
    restored: Callable[[dict[str, ComponentProfile], dict[str, Any], dict[str, Tensor]], Whole],
) -> Whole:
    """Inverse of `write_parts`.

    Args:
        path: The file.
        versions: What it may say that it is.
        restored: Gives the result for the profiles, the header, and the other tensors.

    Raises:
        PlanError: If the file is missing, damaged, or something else; in one line.
    """

    def whole(header: dict[str, Any], tensors: dict[str, Tensor], version: str) -> Whole:
        parts = _parts(header, tensors, old=version == OLD_FORMAT)
        for part in parts.values():
            _check(part)
        return restored(parts, header, tensors)

    return read_tensors(path, versions, whole)


def _restored(
    parts: dict[str, ComponentProfile], header: dict[str, Any], tensors: dict[str, Tensor]
) -> Profile:
    reference = _reference(header.get("reference"), tensors.get(VIDEO))
    settings = GenerationSettings.from_dict(header["settings"])
    done, seconds = list(header["done"]), float(header["seconds"])
    return Profile(parts, settings, header["rows"], done, seconds, reference)


def _parts(
    header: dict[str, Any], tensors: Mapping[str, Tensor], *, old: bool
) -> dict[str, ComponentProfile]:
    parts = {}
    for name, data in header["components"].items():
        layout = data.pop("layout")
        if old:
            if data.pop("wide", False) or data.pop("shared", False):
                raise ValueError("it has candidates that are no longer tried")
            heads = data.pop("num_heads"), data.pop("head_dim")
            data["heads"] = dict.fromkeys(data["layers"], heads)
        data["heads"] = {layer: (int(n), int(d)) for layer, (n, d) in data["heads"].items()}
        layout = layout and TokenLayout.from_dict(layout, OLD_KINDS if old else KINDS)
        parts[name] = ComponentProfile(layout=layout, **data)
    for key, value in tensors.items():
        kind, name, *rest = key.split("|")
        if kind not in KINDS_OF_TENSORS:
            continue
        part = parts[name]
        if kind == "found" and rest[-1].startswith("beyond_"):  # of an older file
            _, layer, tile, field_name = rest
            known = {old: new for new, old in BEYOND.items()}[field_name]
            found = part.beyond.setdefault(layer, {}).setdefault(_tile_of(tile), {})
            found.setdefault(known, _shared(known, value))
        elif kind == "found":
            level, layer, tile, field_name = rest
            orders = part.found.setdefault((int(level), layer), {})
            orders.setdefault(_tile_of(tile), {})[field_name] = _shared(field_name, value)
        elif kind == "beyond":
            layer, tile, field_name = rest
            part.beyond.setdefault(layer, {}).setdefault(_tile_of(tile), {})[field_name] = value
        elif kind == "scores":
            level, layer, field_name = rest
            part.scores.setdefault((int(level), layer), {})[field_name] = value
        elif kind == "looks":
            which, level, layer, field_name = rest
            looks = part.looks.setdefault((which, int(level), layer), {})
            looks[field_name] = _shared(field_name, value)
        else:
            layer, tile = rest
            part.pictures[layer, _tile_of(tile)] = value
    return parts


def _shared(field_name: str, value: Tensor) -> Tensor:
    """A tensor as it is kept: older files repeat for each head, `[H, F, R, C]`, what all have."""
    return value[0].clone() if field_name == COUNT and value.ndim == 4 else value


def _reference(data: dict[str, Any] | None, video: Tensor | None) -> Reference | None:
    if data is None and video is None:
        return None
    if data is None or video is None or not video.isfinite().all():
        raise ValueError("the dense reference is not whole")
    forwards = {name: [float(s) for s in sigmas] for name, sigmas in data["forwards"].items()}
    case = Case(data["prompt"], data["seed"])
    attention = {name: float(seconds) for name, seconds in data["attention"].items()}
    seconds = float(data["seconds"])
    taken = Taken(seconds, float(data.get("wall", seconds)))  # that of older files is by the clock
    return Reference(case, video.numpy(), taken, forwards, attention)


def _check(part: ComponentProfile) -> None:
    """Raise ValueError unless all statistics and scores are there and fit one another."""
    every = {(level, layer) for level in range(len(part.sigmas)) for layer in part.layers}
    if set(part.found) != every or set(part.scores) not in (set(), every):
        raise ValueError("statistics of some layers or noise levels are missing")
    layout = part.known_layout if every else None
    expected = {t: statistics_shapes(layout, t) for t in tilings(layout)} if layout else {}
    for (_, layer), orders in part.found.items():
        found = {tile: _shapes(statistics) for tile, statistics in orders.items()}
        heads = part.heads[layer][0]
        if found != {t: layer_shapes(shapes, heads) for t, shapes in expected.items()}:
            raise ValueError("statistics don't have the layout's shape")
    for layer, orders in part.beyond.items():
        heads = part.heads[layer][0]
        if set(orders) != set(expected) or not all(whole_beyond(s, heads) for s in orders.values()):
            raise ValueError("statistics of greater distances aren't whole")
    shapes = compared_shapes(layout) if layout else {}
    for (_, _, layer), looks in part.looks.items():
        if _shapes(looks) != layer_shapes(shapes, part.heads[layer][0]):
            raise ValueError("what heads are compared by doesn't have the layout's shape")
    wanted = {(HALF, *place) for place in part.found} | {(LATER, *place) for place in part.scores}
    if set(part.looks) != wanted:
        raise ValueError("what heads are compared by is missing for some layers or noise levels")
    for (level, layer), scores in part.scores.items():
        count = len(part.candidates(level, layer)[0])
        shape = (part.heads[layer][0], count)
        if {k: tuple(v.shape) for k, v in scores.items()} != {
            k: shape[:n] for k, n in SCORES.items()
        }:
            raise ValueError(f"scores must be of {count} candidates, are of another version")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in tensors.items()}


def _tile_text(tile: Tile) -> str:
    assert not isinstance(tile, Curve), "heads are profiled in cubes and lines"
    return "x".join("all" if n is None else str(n) for n in tile)


def _tile_of(text: str) -> Tile:
    frames, rows, columns = (None if n == "all" else int(n) for n in text.split("x"))
    return (frames, rows, columns)


@contextlib.contextmanager
def only_writer(path: str | Path, wanted: bool = True) -> Iterator[None]:
    """Hold the lock on a profile file; the lock is a hidden file beside it while it is held.

    Args:
        path: The profile file.
        wanted: Otherwise nothing is locked.

    Raises:
        ValueError: If another process holds it; at once, in one line.
        OSError: If its folder can't be written.
    """
    if not wanted:
        yield
        return
    path = Path(path)
    check_writable(path, option("profile"))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process is writing the profile {path}; wait for it, or name another file"
        ) from None
    try:
        yield
    finally:
        if os.name == "posix":  # elsewhere an open file stays; who locks a removed one tries again
            file.unlink(missing_ok=True)
        lock.release()
