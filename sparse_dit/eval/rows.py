"""A file of measured rows that a command adds to and goes on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..outputs import Outputs
from ..texts import read_text
from ..whole_file import write_text

Row = dict[str, Any]


def kept_rows(file: Path, form: str, conditions: dict[str, Any]) -> list[Row]:
    """The rows in a file; none if it isn't there.

    Args:
        file: JSON.
        form: What its `format` must be.
        conditions: What all of its rows must have in common.

    Raises:
        ValueError: If it is another file, or of other conditions.
    """
    if not file.exists():
        return []
    try:
        data = json.loads(read_text(file))
        known = data["format"] == form and isinstance(data["rows"], list)
        same, rows = data["conditions"] == conditions, data["rows"]
    except (ValueError, LookupError, TypeError):
        known, same, rows = False, False, []
    if not known:
        raise ValueError(f"{file} is no frontier file; name another")
    if not same:
        raise ValueError(
            f"{file} holds rows of other texts, or of other prompts or settings; name another file"
        )
    return rows


def keep_rows(
    outputs: Outputs,
    file: Path,
    form: str,
    conditions: dict[str, Any],
    provenance: dict[str, str],
    rows: Sequence[Row],
) -> None:
    """Write all rows anew, with what they have in common."""
    data = {"format": form, "conditions": conditions, "provenance": provenance, "rows": rows}
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    outputs.put(file, lambda path: write_text(path, text))
