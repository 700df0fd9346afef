"""What a search keeps: tensors with a JSON header in one safetensors file, whole, and checked when read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..plan.errors import PlanError
from ..whole_file import whole_file

Whole = TypeVar("Whole")


def write_tensors(
    path: Path, version: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors with a header; the file appears whole or not at all.

    Args:
        path: The file.
        version: What the file says that it is.
        header: JSON-ready.
        tensors: By name.
    """
    metadata = {"format": version, "header": json.dumps(header)}
    with whole_file(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)


def read_tensors(
    path: Path,
    versions: Sequence[str],
    restored: Callable[[dict[str, Any], dict[str, Tensor], str], Whole],
) -> Whole:
    """Inverse of `write_tensors`.

    Args:
        path: The file.
        versions: What it may say that it is.
        restored: Gives the result for the header, the tensors and the version. What it raises says that the
            file is damaged, but for a PlanError.

    Raises:
        PlanError: If the file is missing, damaged, or something else; in one line.
    """
    if not path.is_file():
        raise PlanError(f"{path}: no such profile file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in versions:
                raise PlanError(
                    f"{path}: not a profile of this version ({versions[0]!r}); name another file"
                )
            header = json.loads(metadata["header"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return restored(header, tensors, metadata["format"])
    except PlanError:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(
            f"{path}: damaged, or no profile ({reason:.200}); name another file, or delete it and profile "
            "again"
        ) from None
