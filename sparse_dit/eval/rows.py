"""A file of measured rows that a command adds to and goes on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..fingerprint import digest, fingerprint
from ..integrations import components
from ..outputs import Outputs
from ..plan import Plan, config_hash
from ..texts import read_text
from ..whole_file import write_text

Row = dict[str, Any]


def kept_rows(file: Path, form: str, conditions: dict[str, Any]) -> list[Row]:
    """The rows in a file; none if it isn't there.

    Args:
        file: JSON.
        form: What its `format` must be.
        conditions: What all of its rows must have in common; where `weights` is None, or the file says
            nothing of them, those may differ.

    Raises:
        ValueError: If it is another file, or of other conditions.
    """
    if not file.exists():
        return []
    try:
        data = json.loads(read_text(file))
        known = data["format"] == form and isinstance(data["rows"], list)
        rows, kept = data["rows"], {"weights": None, **data["conditions"]}
        if None in (kept["weights"], conditions["weights"]):
            kept["weights"] = conditions["weights"]
        same = kept == conditions
    except (ValueError, LookupError, TypeError):
        known, same, rows = False, False, []
    if not known:
        raise ValueError(f"{file} is no frontier file; name another")
    if not same:
        raise ValueError(
            f"{file} holds rows of another model, plan or text, or of other weights, prompts or settings; "
            "name another file"
        )
    return rows


def model_told(model: Any) -> dict[str, str]:
    """What tells a model's rows from another's: a hash of each component's architecture, by name.

    Weights aren't read, so that rows are refused before any are loaded.
    """
    return {name: config_hash(module.config) for name, module in components(model).items()}


def weights_told(model: Any) -> str | None:
    """What tells checkpoints of one architecture apart: a hash of some weights; None before they are read."""
    parts = components(model)
    read = not any(x.is_meta for module in parts.values() for x in module.parameters())
    return fingerprint(parts) if read else None


def texts_told(texts: Mapping[str, str | Mapping[str, Tensor]]) -> dict[str, str]:
    """What tells texts, or prompts as a processor makes them, from others of their names: hashes."""
    return {name: _digest(text) for name, text in texts.items()}


def plans_told(plans: Mapping[str, Plan]) -> dict[str, str]:
    """What tells plans from others of their names: their fingerprints."""
    return {name: plan.fingerprint() for name, plan in plans.items()}


def _digest(text: str | Mapping[str, Tensor]) -> str:
    return hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else digest(text)


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
