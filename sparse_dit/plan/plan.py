"""Plan: which pattern every attention head of a pipeline computes, on disk and in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from . import codec, hub, storage
from .component import ComponentPlan, matches
from .document import parse, place, plain, render
from .errors import PlanError, short
from .identity import sha256
from .schema import CLASS_NAME, COMPONENT_NAME, VERSION, checked

ANY_CONFIG = "0" * 64  # config_hash of a plan for every configuration with its heads and layers

_HEADS = ("number of heads", "head_dim")
_NOTES = ("forecast", "measured", "cost", "provenance")


@dataclass(frozen=True)
class Plan:
    """The choices for a pipeline's transformers, and how they were found.

    The format of its file is described in `profiles/README.md`.

    Args:
        pipeline_class: Name of the pipeline's class; empty for a bare transformer.
        components: One entry a transformer: `"transformer"`, `"transformer_2"`.
        density: Computed pairs / all pairs that dense attention would compute, over a whole
            generation at calibration size, in [0, 1].
        provenance: How it was found: prompts, seeds, steps, library versions, device, objective.
        forecast: What the search expects: speed-up, error.
        measured: What was measured afterwards.
        cost: The cost table the search used.

    Raises:
        PlanError: If a value is out of range or has no JSON form.
    """

    pipeline_class: str
    components: Mapping[str, ComponentPlan]
    density: float
    provenance: dict[str, Any] = field(default_factory=dict)
    forecast: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pipeline_class != "":
            matches("pipeline_class", self.pipeline_class, CLASS_NAME)
        if not self.components:
            raise PlanError("components: must name at least one transformer, got none")
        for name in self.components:
            matches("components", name, COMPONENT_NAME)
        density = self.density
        if (
            isinstance(density, bool)
            or not isinstance(density, int | float)
            or not 0 <= density <= 1
        ):
            raise PlanError(f"density: must be a number from 0 to 1, got {short(density)}")
        object.__setattr__(self, "density", float(density))
        for name in _NOTES:
            if not isinstance(getattr(self, name), dict):
                raise PlanError(f"{name}: must be a dict, got {short(getattr(self, name))}")
            object.__setattr__(self, name, plain(getattr(self, name), (name,)))
        speedup = self.forecast.get("speedup", 1.0)
        if isinstance(speedup, bool) or not isinstance(speedup, int | float) or speedup <= 0:
            raise PlanError(f"forecast.speedup: must be a number > 0, got {short(speedup)}")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan file, or `plan.json` in a folder, and check everything in it.

        Raises:
            PlanError: If there is none, or it is not a valid plan; one line with the place.
        """
        file = storage.plan_path(path)
        data = storage.read(file, storage.MAX_PLAN_BYTES)
        try:
            document = parse(data)
            form = checked(document)
        except PlanError as error:
            raise PlanError(f"{file}: {error}") from None
        tensors = {}
        if form.tensors is not None:
            tensors = storage.read_tensors(storage.tensor_path(file), form.tensors.sha256)
        try:
            return Plan.from_dict(document, tensors)
        except PlanError as error:
            raise PlanError(f"{file}: {error}") from None

    @staticmethod
    def from_pretrained(name: str | os.PathLike[str], *, revision: str | None = None) -> Plan:
        """A plan by path, by built-in name, or by hub id, in this order.

        Args:
            name: A file or folder, the name of a plan in `profiles/`, or `owner/name` on the hub.
            revision: Branch, tag or commit, for the hub.

        Raises:
            PlanError: If there is no such plan, or it is not valid.
        """
        return Plan.load(hub.find(name, revision))

    @staticmethod
    def from_dict(document: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """Inverse of `to_dict`.

        Args:
            document: The JSON document.
            tensors: What `Plan.tensors` gave, for plans with "blocks" patterns.

        Raises:
            PlanError: If it is not a valid plan.
        """
        form, tensors = checked(document), dict(tensors or {})
        storage.check_tensors(tensors)
        components = {
            name: codec.from_form(part, place(("components", name)), tensors)
            for name, part in form.components.items()
        }
        notes = {name: getattr(form, name) for name in _NOTES}
        plan = Plan(form.pipeline_class, components, form.density, **notes)
        patterns = [p for part in plan.components.values() for p in part.distinct_patterns]
        needed = max((pattern.version for pattern in patterns), default=1)
        if needed > form.version:
            raise PlanError(
                f"version: must be {needed} for these patterns, got {form.version}; save the plan anew"
            )
        if spare := sorted(tensors.keys() ^ plan.tensors().keys()):
            raise PlanError(
                f"tensors: must be those that the patterns name, not so {spare[0][:80]!r}"
            )
        if tensors and form.tensors is None:
            raise PlanError("tensors: must hold the SHA-256 of the tensor file, got null")
        return plan

    def to_dict(self) -> dict[str, Any]:
        """The JSON document; what it holds beside JSON is in `tensors`."""
        tensors = storage.tensor_bytes(self.tensors())
        return {
            "version": VERSION,
            "pipeline_class": self.pipeline_class,
            "density": self.density,
            "forecast": self.forecast,
            "measured": self.measured,
            "components": {name: codec.to_document(c) for name, c in self.components.items()},
            "tensors": None if tensors is None else {"sha256": hashlib.sha256(tensors).hexdigest()},
            "cost": self.cost,
            "provenance": self.provenance,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Masks of the "blocks" patterns, uint8 `[bytes]`, by a name that is a hash of them."""
        return {
            name: tensor
            for component in self.components.values()
            for pattern in component.distinct_patterns
            for name, tensor in pattern.tensors().items()
        }

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the plan to `path`, and its tensors, if any, beside it as `.safetensors`.

        Missing folders are made. A file appears whole or not at all.

        Args:
            path: File name that ends in `.json`.
            overwrite: Replace what is there.

        Raises:
            PlanError: If a file is there and `overwrite` is False, or it can't be written.
        """
        data = render(self.to_dict())
        tensors = storage.tensor_bytes(self.tensors())
        storage.write(storage.usable(path), data, tensors, overwrite=overwrite)

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `plan.json` (and `plan.safetensors`) into `folder`; see `save`."""
        self.save(storage.usable(folder) / storage.PLAN_FILE, overwrite=overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        message: str = "Upload sparse_dit plan",
    ) -> str:
        """Upload the plan to a model repository on the Hugging Face hub, made if it isn't there.

        Args:
            repo_id: `owner/name`.
            private: Visibility of a new repository; None for the owner's default.
            message: Commit message.

        Returns:
            URL of the commit.

        Raises:
            PlanError: If huggingface_hub isn't installed, or the hub refuses.
        """
        return hub.push(self, repo_id, private=private, message=message)

    def fingerprint(self) -> str:
        """SHA-256 of what the plan says, in any order, without `measured` and `provenance`."""
        components = {
            name: replace(part, layers=dict(sorted(part.layers.items())))
            for name, part in self.components.items()
        }
        document = replace(self, components=components, measured={}, provenance={}).to_dict()
        return sha256(document)

    def check_model(
        self,
        component: str,
        *,
        model_class: str,
        config_hash: str,
        heads: Mapping[str, tuple[int, int]],
    ) -> None:
        """Raise unless the plan was made for this transformer.

        Args:
            component: Its name in the pipeline.
            model_class: Name of its class.
            config_hash: `config_hash` of its configuration.
            heads: For each of its self-attention layers, by module path, `(num_heads, head_dim)`.

        Raises:
            PlanError: One line with what must hold, what was got, and what to do.
        """
        if component not in self.components:
            raise PlanError(
                f"the plan must have a part for {component!r}, got {sorted(self.components)}; "
                "use a plan made for this pipeline"
            )
        part = self.components[component]
        facts: list[tuple[str, Any, Any, str]] = [("class", part.model_class, model_class, "")]
        for layer, planned in part.heads.items():
            sizes = zip(_HEADS, planned, heads.get(layer, planned), strict=True)
            facts += [(name, wanted, got, f" in {layer}") for name, wanted, got in sizes]
        for name, wanted, got, where in facts:
            if wanted != got:
                raise PlanError(
                    f"{component}: the model's {name} must be {wanted} as in the plan, got {got}{where}; "
                    "use a plan made for this model"
                )
        if missing := [layer for layer in part.layers if layer not in heads]:
            raise PlanError(
                f"{component}: the plan's layers must be in the model, "
                f"{len(missing)} are not, first {missing[0]!r}; use a plan made for this model"
            )
        if part.config_hash not in (ANY_CONFIG, config_hash):
            raise PlanError(
                f"{component}: the model's config_hash must be {part.config_hash[:12]}... as in "
                f"the plan, got {config_hash}; use a plan made for this checkpoint, or set it in the plan "
                "if you know that only a library's defaults changed"
            )
