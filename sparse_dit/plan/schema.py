"""The form of a plan document, version 3, and where 1 and 2 differ: keys, types and ranges.

What concerns several values at once (ids in range, stages that overlap, heads) is checked by the
objects themselves, in `component.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..layout import KINDS, OLD_KINDS, Kinds
from .document import place, plain
from .errors import PlanError, short

VERSION = 3  # that plans are written in
OLD_VERSIONS = (1, 2)  # which are read

MAX_TOKENS = 1 << 24
MAX_STAGES = 256
MAX_LAYERS = 4096
MAX_PATTERNS = 1 << 15
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024

COMPONENT_NAME = r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$"
LAYER_PATH = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$"
CLASS_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
SHA256 = r"^[0-9a-f]{64}$"

Unit = Annotated[float, Field(ge=0, le=1)]
Error = Annotated[float, Field(ge=0)]
Id = Annotated[int, Field(ge=0, lt=MAX_PATTERNS)]
ComponentName = Annotated[str, Field(pattern=COMPONENT_NAME, max_length=64)]
LayerPath = Annotated[str, Field(pattern=LAYER_PATH, max_length=256)]
ClassName = Annotated[str, Field(pattern=CLASS_NAME, max_length=128)]
Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Hash = Annotated[str, Field(pattern=SHA256)]
Heads = Annotated[int, Field(ge=1, le=MAX_HEADS)]
HeadDim = Annotated[int, Field(ge=1, le=MAX_HEAD_DIM)]
Ids = list[list[Id]]  # of patterns, for each stage and head


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StageForm(_Form):
    progress_max: Unit
    progress_min: Unit
    branch: Literal["any", "cond", "uncond"] = "any"
    phase: Literal["any", "prefill", "decode"] = "any"


class OldStageForm(_Form):
    progress_max: Unit = Field(alias="sigma_max")
    progress_min: Unit = Field(alias="sigma_min")
    branch: Literal["any", "cond", "uncond"] = "any"
    phase: ClassVar[Literal["any"]] = "any"


class LayerForm(_Form):
    num_heads: Heads
    head_dim: HeadDim
    patterns: Ids


class EvidenceForm(_Form):
    error: list[Error | None] | None = None
    runner_up: list[Id | None] | None = None
    runner_up_error: list[Error | None] | None = None


class _ComponentForm(_Form):
    model_class: ClassName
    config_hash: Hash
    layout: dict[str, Any]
    valid_tokens: Annotated[list[Tokens | None], Field(min_length=2, max_length=2)]
    patterns: Annotated[list[dict[str, Any]], Field(max_length=MAX_PATTERNS)]
    evidence: dict[LayerPath, list[EvidenceForm]]


class ComponentForm(_ComponentForm):
    kind: Literal["diffusion_transformer", "language_model"]
    stages: Annotated[list[StageForm], Field(min_length=1, max_length=MAX_STAGES)]
    layers: Annotated[dict[LayerPath, LayerForm], Field(max_length=MAX_LAYERS)]
    segments: ClassVar[Kinds] = KINDS  # what they are called in the layout
    patterns_at: ClassVar[str] = ".patterns"  # where a layer's patterns are, from its place on

    def each_layer(self) -> dict[str, LayerForm]:
        return self.layers


class OldComponentForm(_ComponentForm):
    num_heads: Heads
    head_dim: HeadDim
    stages: Annotated[list[OldStageForm], Field(min_length=1, max_length=MAX_STAGES)]
    layers: Annotated[dict[LayerPath, Ids], Field(max_length=MAX_LAYERS)]
    kind: ClassVar[Literal["diffusion_transformer"]] = "diffusion_transformer"
    segments: ClassVar[Kinds] = OLD_KINDS
    patterns_at: ClassVar[str] = ""

    def each_layer(self) -> dict[str, LayerForm]:
        return {
            layer: LayerForm(num_heads=self.num_heads, head_dim=self.head_dim, patterns=ids)
            for layer, ids in self.layers.items()
        }


class TensorsForm(_Form):
    sha256: Hash


class _PlanForm(_Form):
    pipeline_class: Annotated[str, Field(pattern=rf"{CLASS_NAME}|^$", max_length=128)]
    density: Unit
    forecast: dict[str, Any]
    measured: dict[str, Any]
    cost: dict[str, Any]
    provenance: dict[str, Any]
    tensors: TensorsForm | None


class PlanForm(_PlanForm):
    version: Literal[3]
    components: Annotated[dict[ComponentName, ComponentForm], Field(min_length=1, max_length=16)]


class OldPlanForm(_PlanForm):
    version: Literal[1, 2]
    components: Annotated[dict[ComponentName, OldComponentForm], Field(min_length=1, max_length=16)]


def checked(document: Any) -> PlanForm | OldPlanForm:
    """The document in typed form.

    Raises:
        PlanError: If a key is missing, unknown, or has a value of the wrong type or range.
    """
    if not isinstance(document, dict):
        raise PlanError(f"a plan must be a JSON object, got {short(document)}")
    document = plain(document)
    version = document.get("version")
    if "version" not in document:
        raise PlanError("version: missing; is this file a sparse_dit plan?")
    if isinstance(version, bool | float) or version not in (*OLD_VERSIONS, VERSION):
        raise PlanError(
            f"version: must be {', '.join(map(str, OLD_VERSIONS))} or {VERSION}, got {short(version)}; "
            "a plan of a newer version needs a newer sparse_dit"
        )
    form = PlanForm if version == VERSION else OldPlanForm
    try:
        return form.model_validate(document)
    except ValidationError as error:
        raise PlanError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    location, kind = first["loc"], first["type"]
    if kind == "extra_forbidden":
        return f"{place(location[:-1])}: unknown key {short(location[-1])}; remove it"
    if kind == "missing":
        return f"{place(location[:-1])}: the key {short(location[-1])} is missing; add it"
    if location[-1:] == ("[key]",):
        location = location[:-2]
    reason = first["msg"].removeprefix("Input ").replace("String should", "should")
    return f"{place(location)}: {reason.replace('should', 'must', 1)}, got {short(first['input'])}"
