"""A plan's two files: read whole and bounded, written atomically.

`NAME.json` is the plan, `NAME.safetensors` beside it holds its tensors if it has any. The second
name follows from the first, never from what the file says, and its SHA-256 stands in the JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, uint8

from ..whole_file import uninterrupted
from ..words import option
from .errors import PlanError, UnwritablePlan

MAX_PLAN_BYTES = 32 << 20
MAX_TENSOR_BYTES = 1 << 30
PLAN_FILE = "plan.json"


def usable(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` expanded.

    Raises:
        PlanError: If it can't be a path (a null byte, an unknown user).
    """
    try:
        found = Path(path).expanduser()
        found.exists()
    except (ValueError, OSError, RuntimeError) as error:
        raise PlanError(f"{os.fspath(path)[:200]!r}: not a usable path ({error})") from None
    return found


def plan_path(path: str | os.PathLike[str]) -> Path:
    """The plan's JSON file: `path` itself, or `plan.json` in it if it is a folder.

    Raises:
        PlanError: If there is no such file.
    """
    found = usable(path)
    if found.is_dir():
        found = found / PLAN_FILE
    if not found.exists():
        raise PlanError(f"{found}: no such plan file; give a plan.json, or a folder that holds one")
    return found


def tensor_path(path: Path) -> Path:
    """Where the tensors of the plan at `path` lie."""
    return path.with_suffix(".safetensors")


def read(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes.

    Raises:
        PlanError: If it is missing, unreadable, something else than a file, or larger.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before open, which would wait on a pipe
            raise PlanError(f"{path}: must be a regular file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise PlanError(f"{path}: can't be read: {error.strerror}") from None
    if len(data) > limit:
        raise PlanError(f"{path}: must have at most {limit >> 20} MiB")
    return data


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors in a safetensors file: uint8, one dimension.

    Raises:
        PlanError: If the file is missing, isn't the one the plan was saved with, or is damaged.
    """
    if not path.exists():
        raise PlanError(f"{path}: missing; the plan's tensors must lie beside it, copy both files")
    data = read(path, MAX_TENSOR_BYTES)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise PlanError(
            f"{path}: must be the file the plan was saved with (SHA-256 {sha256[:12]}...), "
            "got another or a damaged one; copy both files together"
        )
    try:
        tensors = load_tensors(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise PlanError(f"{path}: not a readable safetensors file ({error})") from None
    check_tensors(tensors)
    return tensors


def check_tensors(tensors: dict[str, Tensor]) -> None:
    """Raise PlanError unless all are uint8 of one dimension."""
    for name, tensor in tensors.items():
        if tensor.dtype != uint8 or tensor.dim() != 1:
            raise PlanError(
                f"tensor {name[:40]!r} must be uint8 of one dimension, "
                f"got {tensor.dtype} of shape {list(tensor.shape)}"
            )


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes | None:
    """The tensors as the bytes of a safetensors file; None if there are none."""
    return save_tensors({name: tensors[name] for name in sorted(tensors)}) if tensors else None


def write(path: Path, plan: bytes, tensors: bytes | None, *, overwrite: bool) -> None:
    """Write both files; each appears whole or not at all.

    Both are complete on disk before the first one gets its name. If the machine stops between the
    two renames, the SHA-256 in the JSON tells.

    Raises:
        PlanError: If `path` is no place for a plan, or is taken and `overwrite` is False.
    """
    if path.suffix != ".json":
        raise PlanError(f"{path}: the name of a plan must end in .json")
    if path.is_dir():
        raise UnwritablePlan(f"{path}: is a folder; give a file name in it")
    contents = {path: plan} if tensors is None else {tensor_path(path): tensors, path: plan}
    for target, limit in ((path, MAX_PLAN_BYTES), (tensor_path(path), MAX_TENSOR_BYTES)):
        if len(contents.get(target, b"")) > limit:
            raise PlanError(f"{target}: must have at most {limit >> 20} MiB")
        if target in contents and os.path.lexists(target) and not overwrite:
            raise UnwritablePlan(
                f"{target}: exists already; pass {option('overwrite=True')} to replace it",
                "it exists by now",
            )
    temporary: dict[Path, Path] = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, data in contents.items():
            temporary[target] = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
            with temporary[target].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        with uninterrupted():  # tensors of one plan beside the text of another fit no more
            for target, source in temporary.items():
                os.replace(source, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnwritablePlan(f"{path}: can't be written: {reason}", reason) from None
    finally:
        for source in temporary.values():
            with contextlib.suppress(FileNotFoundError):
                source.unlink()
