"""What a search for a language model has scored, in a file: an interrupted search goes on from it, and one
with another dial begins with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...fingerprint import digest, fingerprint
from ...integrations import components, heads_of
from ...modalities import MODALITIES
from ...patterns import Pattern
from ...plan import PlanError
from ..tensor_file import read_tensors, write_tensors
from .items import Item
from .problem import Scores
from .scores import LayerScores

FORMAT = "sparse_dit language scores 1"
SUMS = ("error", "norm", "loss", "density")  # of `LayerScores`


def conditions(
    model: Any, patterns: Sequence[Pattern], items: Sequence[Item], draws: int
) -> dict[str, Any]:
    """What scores of one file have in common: model, dtype, patterns, and what they are scored on.

    Args:
        model: The model.
        patterns: The K candidates.
        items: Texts and questions, in their order.
        draws: How often tokens are drawn.
    """
    sampled = [
        digest(
            {**item.text.inputs_on(torch.device("cpu")), "rows": item.rows, "places": item.places}
        )
        for item in items
    ]
    return {
        "model": fingerprint(components(model)),
        "dtype": str(model.dtype),
        "patterns": hashlib.sha256(repr(list(patterns)).encode()).hexdigest(),
        "items": [[found, item.share] for found, item in zip(sampled, items, strict=True)],
        "draws": draws,
    }


def write_scores(scores: Scores, done: int, of: dict[str, Any], path: Path) -> None:
    """Write the scores of the first `done` items; the file appears whole or not at all.

    Args:
        scores: By layer and modality.
        done: How many items are in them.
        of: Their `conditions`.
        path: The file.
    """
    tensors, counts = {}, {}
    for layer, modalities in scores.items():
        for modality, found in modalities.items():
            key = f"{layer}|{modality}"
            counts[key] = [found.pairs, found.texts]
            tensors |= {f"{key}|{name}": getattr(found, name) for name in SUMS}
    write_tensors(path, FORMAT, {"done": done, "counts": counts, "conditions": of}, tensors)


def read_scores(
    path: Path, of: dict[str, Any], patterns: Sequence[Pattern], model: Any
) -> tuple[Scores, int]:
    """Inverse of `write_scores`: the scores, and how many items are in them.

    Raises:
        PlanError: If the file is damaged, something else, or of other conditions; in one line.
    """

    def restored(header: dict[str, Any], tensors: dict[str, Tensor], _: str) -> tuple[Scores, int]:
        if header["conditions"] != of:
            raise PlanError(
                f"{path} is of another model, dtype or version, or of other texts or numbers of rows and "
                "draws; name another file, or delete it"
            )
        scores, heads, done = {}, heads_of(model), int(header["done"])
        for key, (pairs, texts) in header["counts"].items():
            layer, modality = key.rsplit("|", 1)
            empty = LayerScores.empty(heads[layer][0], len(patterns))
            found = replace(empty, **{name: tensors[f"{key}|{name}"] for name in SUMS})
            if modality not in MODALITIES or not _fits(found, empty):
                raise ValueError("its scores aren't whole")
            found.pairs, found.texts = float(pairs), int(texts)
            scores.setdefault(layer, {})[modality] = found
        if not 0 < done <= len(of["items"]):
            raise ValueError(f"it says that {done} texts are scored")
        return scores, done

    return read_tensors(path, (FORMAT,), restored)


def _fits(found: LayerScores, empty: LayerScores) -> bool:
    pairs = [(getattr(found, name), getattr(empty, name)) for name in SUMS]
    return all(
        a.shape == b.shape and a.dtype == b.dtype and bool(a.isfinite().all()) for a, b in pairs
    )
