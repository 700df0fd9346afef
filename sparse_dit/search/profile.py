"""Profile: what the search knows of a model's heads, measured through the stock pipeline."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..generation import Case, GenerationSettings, generate
from ..integrations.diffusers import attach, components
from ..layout import Tile, TokenLayout
from ..plan import config_hash
from ..plan.errors import PlanError
from .candidates import all_candidates, tilings
from .recorder import Recorder
from .statistics import HeadStatistics

FORMAT = "sparse_dit profile 1"


@dataclass
class ComponentProfile:
    """One transformer's heads at one layout; S recorded noise levels, H heads.

    Args:
        model_class, config_hash, num_heads, head_dim: What the profile is of.
        layout: Size at calibration.
        sigmas: Noise levels recorded, falling, `[S]`.
        layers: Module paths, in order of execution.
        found: For `(level, layer)` a list over heads of their statistics (discovery).
        scores: For `(level, layer)` the accumulators `error`, `error_squared`, `recall` `[H, K]` and
            `norm`, `rows` `[H]` (scoring); see `statistics.score`.
        pictures: For layer paths, `[H, R, C]` attention of the sampled rows at the middle level.
    """

    model_class: str
    config_hash: str
    num_heads: int
    head_dim: int
    layout: TokenLayout | None = None
    sigmas: list[float] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    found: dict[tuple[int, str], list[HeadStatistics]] = field(default_factory=dict)
    scores: dict[tuple[int, str], dict[str, Tensor]] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    _candidates: dict[tuple[int, str], list[Any]] = field(default_factory=dict, repr=False)

    def candidates(self, level: int, layer: str) -> list[tuple[Any, ...]]:
        """Candidates of each head of a layer at a noise level: `[H][K]` patterns."""
        key = (level, layer)
        if key not in self._candidates:
            self._candidates[key] = [all_candidates(h, self.layout) for h in self.found[key]]
        return self._candidates[key]

    def relative_error(self, level: int, layer: str) -> Tensor:
        """Squared relative L2 error of each head's output for each candidate, `[H, K]`."""
        scores = self.scores[level, layer]
        return scores["error"] / scores["norm"][:, None].clamp_min(1e-20)

    def standard_error(self, level: int, layer: str) -> Tensor:
        """One standard error of `relative_error`, from the spread over sampled rows, `[H, K]`."""
        scores = self.scores[level, layer]
        rows = scores["rows"][:, None]
        variance = (scores["error_squared"] / rows - (scores["error"] / rows).square()).clamp_min(0)
        return (variance * rows).sqrt() / scores["norm"][:, None].clamp_min(1e-20)


@dataclass
class Profile:
    """A pipeline's profile: one `ComponentProfile` a transformer, and how it was made."""

    components: dict[str, ComponentProfile]
    settings: GenerationSettings
    rows: int
    done: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, atomically."""
        tensors, parts = {}, {}
        for name, part in self.components.items():
            for (level, layer), heads in part.found.items():
                for tile in heads[0]:
                    for key in heads[0][tile]:
                        stacked = torch.stack([head[tile][key] for head in heads])
                        tensors[f"found|{name}|{level}|{layer}|{_tile_text(tile)}|{key}"] = stacked
            for (level, layer), scores in part.scores.items():
                for key, value in scores.items():
                    tensors[f"scores|{name}|{level}|{layer}|{key}"] = value
            for layer, value in part.pictures.items():
                tensors[f"pictures|{name}|{layer}"] = value
            parts[name] = {
                "model_class": part.model_class,
                "config_hash": part.config_hash,
                "num_heads": part.num_heads,
                "head_dim": part.head_dim,
                "layout": part.layout and part.layout.to_dict(),
                "sigmas": part.sigmas,
                "layers": part.layers,
            }
        header = {
            "components": parts,
            "settings": self.settings.to_dict(),
            "rows": self.rows,
            "done": self.done,
            "seconds": self.seconds,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        os.close(handle)
        try:
            metadata = {"format": FORMAT, "header": json.dumps(header)}
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Inverse of `save`.

        Raises:
            PlanError: If the file is missing, damaged, or no profile; in one line.
        """
        path = Path(path)
        if not path.is_file():
            raise PlanError(
                f"no profile at {path}; make one with `sparse-dit search --profile {path}`"
            )
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise PlanError(f"{path} is no profile of this version; expected {FORMAT!r}")
                header = json.loads(metadata["header"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return _restore(header, tensors)
        except (SafetensorError, KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PlanError(f"{path} is damaged ({reason}); delete it and profile again") from None


def _restore(header: dict[str, Any], tensors: dict[str, Tensor]) -> Profile:
    parts = {}
    for name, data in header["components"].items():
        layout = data.pop("layout")
        parts[name] = ComponentProfile(layout=layout and TokenLayout.from_dict(layout), **data)
    for key, value in tensors.items():
        kind, name, *rest = key.split("|")
        part = parts[name]
        if kind == "found":
            level, layer, tile, field_name = rest
            heads = part.found.setdefault((int(level), layer), [{} for _ in value])
            for head, row in zip(heads, value, strict=True):
                head.setdefault(_tile_of(tile), {})[field_name] = row
        elif kind == "scores":
            level, layer, field_name = rest
            part.scores.setdefault((int(level), layer), {})[field_name] = value
        else:
            part.pictures[rest[0]] = value
    settings = GenerationSettings.from_dict(header["settings"])
    return Profile(parts, settings, header["rows"], header["done"], header["seconds"])


def _tile_text(tile: Tile) -> str:
    return "x".join("all" if n is None else str(n) for n in tile)


def _tile_of(text: str) -> Tile:
    frames, rows, columns = (None if n == "all" else int(n) for n in text.split("x"))
    return (frames, rows, columns)


def profile_pipeline(
    pipe: Any,
    cases: Sequence[Case],
    settings: GenerationSettings,
    *,
    rows: int = 96,
    path: str | Path | None = None,
    report: Any = None,
) -> Profile:
    """Run the stock pipeline over the cases and record every head.

    The first half of the cases (at least one) finds where heads look, the others measure how well
    every candidate does; with a single case, it is run twice with different sampled rows and noise.

    Args:
        pipe: A diffusers pipeline of a supported class, not patched.
        cases: Calibration prompts and seeds.
        settings: Size and steps of the profiling runs; few steps suffice, as plans go by noise level.
        rows: Sampled query rows for each head, layer, step and case.
        path: Where the profile is saved after each case; an existing one of the same model and
            settings is taken up where it stopped.
        report: Called with `(done, total, text)`.

    Raises:
        ValueError: If there are no cases, or `path` holds another model's profile.
    """
    if not cases:
        raise ValueError("profiling needs at least one prompt, got none")
    phases = _phases(cases)
    profile = _resume(pipe, settings, rows, path)
    for number, (phase, case, salt) in enumerate(phases):
        label = f"{phase}|{salt}|{case.seed}|{case.prompt}"
        if label in profile.done:
            continue
        if report:
            report(number, len(phases), f"{phase}: {case.prompt}")
        profile.seconds += _run(pipe, profile, phase, Case(case.prompt, case.seed + salt))
        profile.done.append(label)
        if path is not None:
            profile.save(path)
    if report:
        report(len(phases), len(phases), "profiled")
    return profile


def _phases(cases: Sequence[Case]) -> list[tuple[str, Case, int]]:
    if len(cases) == 1:
        return [("find", cases[0], 0), ("score", cases[0], 1)]
    half = len(cases) // 2
    return [("find", c, 0) for c in cases[:half]] + [("score", c, 0) for c in cases[half:]]


def _resume(pipe: Any, settings: GenerationSettings, rows: int, path: str | Path | None) -> Profile:
    fresh = {
        name: ComponentProfile(
            type(module).__name__, config_hash(module.config), *_heads(module), layers=[]
        )
        for name, module in components(pipe).items()
    }
    if path is None or not Path(path).exists():
        return Profile(fresh, settings, rows)
    profile = Profile.load(path)
    same = {n: p.config_hash for n, p in profile.components.items()} == {
        n: p.config_hash for n, p in fresh.items()
    }
    if not same or profile.settings != settings or profile.rows != rows:
        raise ValueError(
            f"{path} is the profile of another model, size or number of rows; name another file"
        )
    return profile


def _heads(module: Any) -> tuple[int, int]:
    config = module.config
    return config.num_attention_heads, config.attention_head_dim


def _run(pipe: Any, profile: Profile, phase: str, case: Case) -> float:
    """One generation with a recorder on every transformer; all of it undone afterwards."""
    attachments = []
    try:
        for name, module in components(pipe).items():
            recorder = Recorder(profile.components[name], phase, profile.rows, case.seed)
            attachments.append(attach(module, recorder))
        return generate(pipe, case, profile.settings)[1]
    finally:
        for attachment in attachments:
            attachment.detach()


def expected_tilings(profile: ComponentProfile) -> tuple[Tile, ...]:
    """The token orders that the profile's statistics are in."""
    return tilings(profile.layout)
