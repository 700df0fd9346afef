"""Plans: the file format, what is refused, saving, merging, comparing."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as tensors_to_bytes

from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import (
    PATTERNS,
    Blocks,
    Curve,
    Dense,
    Pattern,
    Skip,
    SlidingTile,
    Stencil,
    Stripe,
    Union,
    Vertical,
    Window,
)
from sparse_dit.plan import (
    ComponentPlan,
    HeadChoice,
    Plan,
    PlanError,
    Stage,
    built_in,
    config_hash,
    diff,
    hub,
    merge,
    summary_rows,
)
from sparse_dit.plan.document import parse, render

GOLDEN = Path(__file__).parent / "golden" / "plan_v1.json"
GOLDEN_2 = GOLDEN.with_name("plan_v2.json")
HASH = "0123456789abcdef" * 4
FINGERPRINT = "86966a58e5cc2de144cea85b10b15664762b643994598a6281102c06f51bd4e5"
DENSE, NEAR = Pattern(Dense()), Pattern(Window(frames=1), far=True)


def component(**changes: Any) -> ComponentPlan:
    values = {
        "model_class": "WanTransformer3DModel",
        "config_hash": HASH,
        "num_heads": 2,
        "head_dim": 24,
        "layout": TokenLayout.video(8, 16, 16),
        "stages": (Stage(1.0, 0.5), Stage(0.5, 0.0)),
        "layers": {
            "blocks.0.attn1": (
                (HeadChoice(DENSE), HeadChoice(DENSE)),
                (HeadChoice(NEAR, 0.125, DENSE, 0.0), HeadChoice(DENSE)),
            )
        },
        "valid_tokens": (2048, None),
    }
    return ComponentPlan(**(values | changes))


def small(**changes: Any) -> Plan:
    values = {"pipeline_class": "WanPipeline", "components": {"transformer": component()}}
    return Plan(**(values | {"density": 0.5} | changes))


def assert_refused(message: str, *words: str) -> None:
    """One line, printable, of bounded length, that says what the words say."""
    assert message.isprintable() and "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message


# --- the golden file


def test_golden_file_holds_every_pattern():
    plan = Plan.load(GOLDEN)
    assert {p.name for p in plan.components["transformer"].distinct_patterns} == PATTERNS.keys()


def test_golden_file_loads_and_saves_to_the_same_bytes(tmp_path):
    Plan.load(GOLDEN).save(tmp_path / "plan_v1.json")
    for name in ("plan_v1.json", "plan_v1.safetensors"):
        assert (tmp_path / name).read_bytes() == GOLDEN.with_name(name).read_bytes()


def test_version_2_is_written_where_it_is_needed_alone(tmp_path):
    plan = Plan.load(GOLDEN_2)
    assert plan.version == 2 and Plan.load(GOLDEN).version == 1
    plan.save(tmp_path / "plan_v2.json")
    assert (tmp_path / "plan_v2.json").read_bytes() == GOLDEN_2.read_bytes()
    assert small().version == small().to_dict()["version"] == 1
    later = {**json.loads(GOLDEN.read_bytes()), "version": 2}
    assert Plan.from_dict(later, Plan.load(GOLDEN).tensors()).version == 1


def test_the_golden_file_of_version_2_means_what_it_says():
    patterns = Plan.load(GOLDEN_2).components["transformer"].distinct_patterns
    assert patterns[1:] == (
        Pattern(Window(columns=(0.0, 0.125)), Curve("frame"), far=True),
        Pattern(Stencil(((-1, 0, -2, 5), (0, 0, -2, 5))), Curve("frame", 16, 4), sink_frames=1),
        Pattern(Stencil(((0, 0, -3, 7),), (0, 0, 9)), Curve("video", None), cell=32),
        Pattern(Window(1, 1, 1), far=True, every=2),
        Pattern(Dense(), every=3),
        Pattern(Skip(), (1, 8, 8), far=True, pool=16),
    )


def test_golden_file_means_what_it_says():
    plan = Plan.load(GOLDEN)
    part = plan.components["transformer"]
    assert plan.density == 0.4375 and plan.forecast == {"speedup": 1.5, "error": 0.08}
    assert part.layout == TokenLayout.video(8, 16, 16, text_before=4)
    assert part.valid_tokens == (2048, None)
    head = part.layers["blocks.0.attn1"][1][0]
    assert head.pattern == Pattern(Window(1, 4, (2.0, 0.25)), far=True)
    assert (head.error, head.runner_up_error) == (0.0625, 0.125)
    assert head.runner_up == Pattern(
        Stencil(((-1, 0, 0, 1), (0, -1, -1, 3), (0, 0, -2, 5))), cell=32, far=True
    )
    blocks = part.layers["blocks.1.attn1"][1][1].pattern.shape
    assert torch.equal(blocks.mask(), torch.eye(8, dtype=torch.bool))


def test_fingerprint_of_the_golden_file_does_not_change():
    assert Plan.load(GOLDEN).fingerprint() == FINGERPRINT


def test_one_pattern_and_one_layer_a_line():
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert sum('{"name": ' in line for line in lines) == 9
    assert sum('"blocks.1.attn1": [[' in line for line in lines) == 1


def test_the_example_in_the_format_description_is_a_plan_as_saved(tmp_path):
    page = (Path(__file__).parents[1] / "profiles" / "README.md").read_text(encoding="utf-8")
    example = page.split("```json\n")[1].split("```")[0]
    (tmp_path / "example.json").write_text(example, encoding="utf-8")
    Plan.load(tmp_path / "example.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == example


def test_the_format_description_names_every_pattern_and_parameter():
    page = (Path(__file__).parents[1] / "profiles" / "README.md").read_text(encoding="utf-8")
    own = {"bits": "mask"}  # named after the tensor in the file
    for name, shape in PATTERNS.items():
        assert f"| `{name}` |" in page
        fields = dataclasses.fields(shape) if dataclasses.is_dataclass(shape) else ()
        for field in fields:
            assert f"`{own.get(field.name, field.name)}`" in page


# --- what applies to a call


@pytest.mark.parametrize(
    ("sigma", "branch", "stage"),
    [
        (1.0, "cond", 0),
        (0.8500001, "any", 0),
        (0.85, "cond", 1),
        (0.85, "uncond", 2),
        (0.0, "cond", 1),
        (0.5, "any", None),
        (1.5, "any", None),
        (-0.1, "cond", None),
        (float("nan"), "cond", None),
        (None, "cond", None),
    ],
)
def test_stage_by_noise_level_and_branch(sigma, branch, stage):
    part = Plan.load(GOLDEN).components["transformer"]
    assert part.stage(sigma, branch) == stage
    expected = None if stage is None else part.layers["blocks.1.attn1"][stage]
    patterns = part.patterns("blocks.1.attn1", sigma, branch)
    assert patterns == (None if expected is None else tuple(h.pattern for h in expected))
    assert part.patterns("blocks.1.attn1", sigma, branch) is patterns


def test_a_layer_that_is_not_named_runs_stock_attention():
    part = Plan.load(GOLDEN).components["transformer"]
    assert part.patterns("blocks.10.attn1", 0.9) is None
    assert part.patterns("blocks.1", 0.9) is None


def test_unknown_branch_is_an_error():
    with pytest.raises(ValueError, match="branch must be one of"):
        component().patterns("blocks.0.attn1", 0.5, "negative")


@pytest.mark.parametrize("steps", [1, 4, 50, 1000])
def test_stages_cover_any_number_of_steps(steps):
    sigmas = [i / steps for i in range(steps, -1, -1)]
    assert all(component().patterns("blocks.0.attn1", sigma) for sigma in sigmas)


# --- broken files


def document() -> dict[str, Any]:
    return json.loads(GOLDEN.read_bytes())


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """The golden document with one value replaced or added."""
    plan = document()
    target = plan
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = to
    return plan


def without(*path: Any) -> dict[str, Any]:
    plan = document()
    target = plan
    for step in path[:-1]:
        target = target[step]
    del target[path[-1]]
    return plan


C = ("components", "transformer")
L0 = (*C, "layers", "blocks.0.attn1")
L1 = (*C, "layers", "blocks.1.attn1")
E0 = (*C, "evidence", "blocks.0.attn1")
IN = "components.transformer"
BAD_DOCUMENTS = {
    "no version": (without("version"), "version: missing"),
    "version 3": (changed("version", to=3), "version: must be 1 or 2, got 3"),
    "version true": (changed("version", to=True), "version: must be 1 or 2, got True"),
    "version 1.0": (changed("version", to=1.0), "version: must be 1 or 2, got 1.0"),
    "version text": (changed("version", to="1"), "version: must be 1 or 2, got '1'"),
    "curve in version 1": (
        changed(*C, "patterns", 1, "tile", to={"curve": "frame"}),
        "version: must be 2 for these patterns, got 1",
    ),
    "every in version 1": (
        changed(*C, "patterns", 1, "every", to=2),
        "version: must be 2 for these patterns, got 1",
    ),
    "pool in version 1": (
        changed(*C, "patterns", 1, "pool", to=16),
        "version: must be 2 for these patterns, got 1",
    ),
    "pool 0": (changed(*C, "patterns", 1, "pool", to=0), f"{IN}.patterns[1]: window: pool: "),
    "pool without far": (
        changed(*C, "patterns", 6, "pool", to=16),
        f"{IN}.patterns[6]: tile: pool must be left out without far, got 16",
    ),
    "every 0": (changed(*C, "patterns", 1, "every", to=0), f"{IN}.patterns[1]: window: every: "),
    "every 65": (changed(*C, "patterns", 1, "every", to=65), f"{IN}.patterns[1]: window: every: "),
    "every true": (changed(*C, "patterns", 1, "every", to=True), f"{IN}.patterns[1]: window: "),
    "unknown curve": (
        changed(*C, "patterns", 1, "tile", to={"curve": "peano"}),
        f"{IN}.patterns[1]: window: tile: curve: Input should be 'frame' or 'video', got peano",
    ),
    "curve's unknown key": (
        changed(*C, "patterns", 1, "tile", to={"curve": "frame", "rows": 2}),
        f"{IN}.patterns[1]: window: tile: rows: ",
    ),
    "curve through video of frames": (
        changed(*C, "patterns", 1, "tile", to={"curve": "video", "frames": 2}),
        f"{IN}.patterns[1]: window: tile: ",
    ),
    "unknown key": (changed("weights", to=1), "plan: unknown key 'weights'; remove it"),
    "unknown key in component": (changed(*C, "x", to=1), f"{IN}: unknown key 'x'"),
    "unknown key in stage": (changed(*C, "stages", 0, "x", to=1), f"{IN}.stages[0]: unknown key"),
    "unknown key in pattern": (
        changed(*C, "patterns", 0, "x", to=1),
        f"{IN}.patterns[0]: dense: x",
    ),
    "unknown key in evidence": (changed(*E0, 1, "x", to=1), f'{IN}.evidence."blocks.0.attn1"[1]'),
    "unknown key in layout": (changed(*C, "layout", "x", to=1), f"{IN}.layout: a layout must be"),
    "unknown key in tensors": (changed("tensors", "path", to="a"), "tensors: unknown key 'path'"),
    "no components": (without("components"), "plan: the key 'components' is missing"),
    "empty components": (changed("components", to={}), "components: "),
    "components list": (changed("components", to=[]), "components: must be a valid dictionary"),
    "no heads": (without(*C, "num_heads"), f"{IN}: the key 'num_heads' is missing"),
    "bool for int": (changed(*C, "num_heads", to=True), f"{IN}.num_heads: must be a valid integer"),
    "float for int": (changed(*C, "num_heads", to=3.0), f"{IN}.num_heads: must be a valid integer"),
    "text for int": (changed(*C, "num_heads", to="3"), f"{IN}.num_heads: must be a valid integer"),
    "no head": (changed(*C, "num_heads", to=0), f"{IN}.num_heads: must be greater than"),
    "too many heads": (changed(*C, "num_heads", to=10**6), f"{IN}.num_heads: must be less than"),
    "10^30": (changed(*C, "num_heads", to=10**30), f"{IN}.num_heads: an integer must fit 64 bits"),
    "negative head_dim": (changed(*C, "head_dim", to=-24), f"{IN}.head_dim: must be greater"),
    "another number of heads": (changed(*C, "num_heads", to=4), "must have 4 heads, got 3"),
    "density 1.5": (
        changed("density", to=1.5),
        "density: must be less than or equal to 1, got 1.5",
    ),
    "density null": (changed("density", to=None), "density: must be a valid number, got None"),
    "hash": (changed(*C, "config_hash", to="abc"), f"{IN}.config_hash: must match"),
    "class": (changed(*C, "model_class", to="os.system('x')"), f"{IN}.model_class: must match"),
    "pipeline": (changed("pipeline_class", to="../Wan"), "pipeline_class: must match"),
    "component path": (
        changed("components", "../x", to=1),
        "components: must match pattern '^[a-z]",
    ),
    "component dunder": (
        changed("components", "__class__", to=1),
        "components: must match pattern",
    ),
    "layer path": (
        changed(*C, "layers", "../../etc/passwd", to=[]),
        f"{IN}.layers: must match pattern",
    ),
    "layer absolute": (changed(*C, "layers", "/etc/passwd", to=[]), "must match pattern"),
    "layer newline": (changed(*C, "layers", "a\n", to=[]), "must match pattern"),
    "layer null byte": (changed(*C, "layers", "a\0b", to=[]), "control characters"),
    "layer null": (changed(*L0, to=None), f'{IN}.layers."blocks.0.attn1": must be a valid list'),
    "id too high": (changed(*L0, 1, 0, to=9), f'{IN}.layers."blocks.0.attn1"[1][0]: must be the'),
    "id negative": (changed(*L0, 1, 0, to=-1), "must be greater than or equal to 0, got -1"),
    "id bool": (changed(*L0, 1, 0, to=False), "must be a valid integer, got False"),
    "id null": (changed(*L0, 1, 0, to=None), "must be a valid integer, got None"),
    "head missing": (without(*L0, 0, 0), 'layers."blocks.0.attn1"[0]: must have 3 heads, got 2'),
    "stage missing": (changed(*L1, to=[[0, 0, 0]]), '"blocks.1.attn1": must have 3 stages, got 1'),
    "evidence of no layer": (
        changed(*C, "evidence", "a", to=[]),
        f'{IN}.evidence."a": no such layer',
    ),
    "evidence short": (changed(*E0, to=[{}]), "must have 3 stages as in layers, got 1"),
    "evidence heads": (changed(*E0, 1, "error", to=[0.5]), "[1].error: must have 3 heads, got 1"),
    "evidence negative": (
        changed(*E0, 1, "error", 0, to=-0.5),
        "must be greater than or equal to 0",
    ),
    "evidence id": (changed(*E0, 1, "runner_up", 0, to=99), "must be the number of one of the 9"),
    "evidence of no runner-up": (changed(*E0, 1, "runner_up", 0, to=None), "without a runner_up"),
    "no stages": (changed(*C, "stages", to=[]), f"{IN}.stages: "),
    "stage above 1": (changed(*C, "stages", 0, "sigma_max", to=1.5), f"{IN}.stages[0].sigma_max"),
    "stage upside down": (
        changed(*C, "stages", 0, "sigma_min", to=1.0),
        f"{IN}.stages[0]: a stage must have 0 <= sigma_min < sigma_max <= 1",
    ),
    "stages overlap": (
        changed(*C, "stages", 0, "sigma_min", to=0.5),
        f"{IN}.stages[1]: must not overlap stages[0]",
    ),
    "stages not ordered": (
        changed(*C, "stages", 0, to={"sigma_max": 0.1, "sigma_min": 0.0}),
        f"{IN}.stages: must be ordered",
    ),
    "branch": (changed(*C, "stages", 0, "branch", to="both"), f"{IN}.stages[0].branch: must be"),
    "valid_tokens": (
        changed(*C, "valid_tokens", to=[9, 8]),
        f"{IN}.valid_tokens: the maximum must be >=",
    ),
    "valid_tokens null": (changed(*C, "valid_tokens", to=[None, 8]), "the minimum must be an int"),
    "valid_tokens short": (changed(*C, "valid_tokens", to=[9]), f"{IN}.valid_tokens: "),
    "layout size": (changed(*C, "layout", to={"segments": [["video", 9, 9, 0]]}), f"{IN}.layout: "),
    "layout huge": (changed(*C, "layout", to={"segments": [["text", 1 << 40]]}), f"{IN}.layout: "),
    "layout empty": (changed(*C, "layout", to={"segments": []}), f"{IN}.layout: a layout needs"),
    "unknown pattern": (
        changed(*C, "patterns", 0, "name", to="banana"),
        f"{IN}.patterns[0]: unknown pattern 'banana'; expected one of",
    ),
    "pattern without name": (
        changed(*C, "patterns", 0, to={}),
        f"{IN}.patterns[0]: unknown pattern",
    ),
    "pattern a text": (
        changed(*C, "patterns", 0, to="dense"),
        f"{IN}.patterns[0]: must be a valid",
    ),
    "pattern bool": (changed(*C, "patterns", 1, "frames", to=True), f"{IN}.patterns[1]: window: "),
    "pattern negative": (
        changed(*C, "patterns", 1, "frames", to=-1),
        f"{IN}.patterns[1]: window: ",
    ),
    "pattern tile": (
        changed(*C, "patterns", 1, "tile", to=[0, 1, 1]),
        f"{IN}.patterns[1]: window: ",
    ),
    "tensor path": (
        changed(*C, "patterns", 7, "mask", to="../../etc/passwd"),
        f"{IN}.patterns[7]: blocks: no tensor '../../etc/passwd'",
    ),
    "tensor number": (
        changed(*C, "patterns", 7, "mask", to=7),
        f"{IN}.patterns[7]: blocks: no tensor",
    ),
    "tensors null": (changed("tensors", to=None), f"{IN}.patterns[7]: blocks: no tensor"),
    "other tensors": (
        changed("tensors", "sha256", to="0" * 64),
        "must be the file the plan was saved",
    ),
    "sha256": (changed("tensors", "sha256", to="../x"), "tensors.sha256: must match"),
    "notes a list": (changed("provenance", to=[]), "provenance: must be a valid dictionary"),
    "escape codes": (changed("provenance", "x", to="\x1b[2J"), "provenance.x: control characters"),
    "half a character": (changed("provenance", "x", to="\ud800"), "control characters"),
    "long text": (changed("provenance", "x", to="x" * 70_000), "at most 65536 characters"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_bad_document_is_refused_in_one_line(case, tmp_path):
    plan, words = BAD_DOCUMENTS[case]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    file.with_suffix(".safetensors").write_bytes(GOLDEN.with_suffix(".safetensors").read_bytes())
    with pytest.raises(PlanError) as caught:
        Plan.load(file)
    assert_refused(str(caught.value), words, str(tmp_path))


GOOD = GOLDEN.read_bytes()
BAD_BYTES = {
    "empty": (b"", "the file is empty"),
    "blank": (b" \n ", "the file is empty"),
    "truncated": (GOOD[: len(GOOD) // 2], "not valid JSON at line"),
    "one byte short": (GOOD.rstrip()[:-1], "not valid JSON at line"),
    "trailing text": (GOOD + b"x", "not valid JSON at line"),
    "binary": (bytes(range(256)) * 8, "not a text file"),
    "pickle": (b"\x80\x04\x95\x00", "not a text file"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "not valid JSON"),
    "utf-16": (GOOD.decode().encode("utf-16"), "not a text file"),
    "a list": (b"[]", "a plan must be a JSON object, got list of 0"),
    "a number": (b"1", "a plan must be a JSON object, got 1"),
    "null": (b"null", "a plan must be a JSON object, got None"),
    "no plan": (b"{}", "version: missing; is this file a sparse_dit plan?"),
    "deep list": (b'{"version": 1, "cost": ' + b"[" * 100_000, "nested deeper than"),
    "deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than"),
    "deep, not very": (b'{"a":' * 30 + b"1" + b"}" * 30, "nested deeper than 24 levels"),
    "NaN": (b'{"density": NaN}', "density: a number must be finite, got NaN"),
    "-Infinity": (b'{"density": [-Infinity]}', "density[0]: a number must be finite"),
    "1e400": (b'{"density": 1e400}', "density: a number must be finite, got inf"),
    "10^30": (b'{"density": 1' + b"0" * 30 + b"}", "density: an integer must fit 64 bits"),
    "10^10000": (b'{"density": 1' + b"0" * 10_000 + b"}", "density: an integer must fit 64 bits"),
    "key twice": (b'{"cost": {"a": 1, "a": 1}}', "cost: the key 'a' occurs twice"),
    "plan twice": (b'{"version": 1, "version": 1}', "plan: the key 'version' occurs twice"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bad_file_is_refused_in_one_line(case, tmp_path):
    data, words = BAD_BYTES[case]
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(PlanError) as caught:
        Plan.load(tmp_path)
    assert_refused(str(caught.value), words, "plan.json: ")


def test_many_random_damages_never_escape_as_another_error():
    rng = random.Random(0)
    tensors = Plan.load(GOLDEN).tensors()
    for _ in range(400):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            data[start : start + rng.randint(0, 3)] = rng.choice(
                [b"", b"0", b"-", b'"', b"]", b"{", b"null", b"true", b"\xff", b"9999999999"]
            )
        try:
            Plan.from_dict(parse(bytes(data)), tensors)
        except PlanError as error:
            assert_refused(str(error))


def test_any_value_in_any_place_is_a_plan_or_a_plan_error():
    rng = random.Random(1)
    tensors = Plan.load(GOLDEN).tensors()
    weird = [None, True, -1, 0, 1, 2**63, 0.5, 1e308, "", "dense", "../x", [], [[]], {}, {"a": 1}]
    for _ in range(1500):
        plan = document()
        target: Any = plan
        while True:
            key = (
                rng.choice(list(target)) if isinstance(target, dict) else rng.randrange(len(target))
            )
            if not isinstance(target[key], dict | list) or not target[key] or rng.random() < 0.1:
                break
            target = target[key]
        target[key] = rng.choice(weird)
        try:
            assert Plan.from_dict(plan, tensors).to_dict()
        except PlanError as error:
            assert_refused(str(error))


def test_file_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_dit.plan.storage.MAX_PLAN_BYTES", 1 << 20)
    (tmp_path / "plan.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(PlanError, match=r"plan\.json: must have at most 1 MiB"):
        Plan.load(tmp_path)


# --- paths


@pytest.mark.parametrize(
    "name", ["missing.json", ".", "a/b", "no\0byte.json", "x" * 5000, "~nobody0/x"]
)
def test_no_plan_at_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=r"no such plan file|not a usable path") as caught:
        Plan.load(name)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="must be a regular file"):
        Plan.load(tmp_path)


def test_links_are_followed_as_the_hub_cache_needs(tmp_path):
    for name in ("plan.json", "plan.safetensors"):
        (tmp_path / name).symlink_to(GOLDEN.with_name(name.replace("plan.", "plan_v1.")))
    assert Plan.load(tmp_path) == Plan.load(GOLDEN)


def test_saving_over_a_link_replaces_the_link_and_not_its_target(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "plan.json").symlink_to(tmp_path / "target")
    small().save(tmp_path / "plan.json", overwrite=True)
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "plan.json").is_symlink()


# --- tensors


def with_tensors(folder: Path, data: bytes) -> Path:
    """The golden plan in `folder` beside a tensor file of these bytes, with the right SHA-256."""
    plan = changed("tensors", "sha256", to=hashlib.sha256(data).hexdigest())
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "plan.safetensors").write_bytes(data)
    return folder


MASK = Blocks.from_mask(torch.eye(8, dtype=torch.bool), (2, 2, 2)).tensor_name
BAD_TENSORS = {
    "empty": (b"", "not a readable safetensors file"),
    "pickle": (b"\x80\x04cposix\nsystem\n", "not a readable safetensors file"),
    "huge header": (b"\xff" * 64, "not a readable safetensors file"),
    "truncated": (GOLDEN.with_suffix(".safetensors").read_bytes()[:-1], "not a readable"),
    "path as name": ({"../../etc/passwd": torch.zeros(8, dtype=torch.uint8)}, "no tensor"),
    "float": ({MASK: torch.zeros(8)}, "must be uint8 of one dimension, got torch.float32"),
    "matrix": ({MASK: torch.zeros(8, 1, dtype=torch.uint8)}, "must be uint8 of one dimension"),
    "size": ({MASK: torch.zeros(9, dtype=torch.uint8)}, "takes 8 bytes, got 9"),
    "other content": ({MASK: torch.zeros(8, dtype=torch.uint8)}, "tensors: must be those"),
    "one more": (
        Plan.load(GOLDEN).tensors() | {"spare": torch.zeros(8, dtype=torch.uint8)},
        "tensors: must be those that the patterns name, not so 'spare'",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_in_one_line(case, tmp_path):
    data, words = BAD_TENSORS[case]
    folder = with_tensors(tmp_path, data if isinstance(data, bytes) else tensors_to_bytes(data))
    with pytest.raises(PlanError) as caught:
        Plan.load(folder)
    assert_refused(str(caught.value), words)


def test_tensor_file_must_be_there_and_be_the_right_one(tmp_path):
    Plan.load(GOLDEN).save(tmp_path / "plan.json")
    tensors = tmp_path / "plan.safetensors"
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1])
    with pytest.raises(PlanError, match="must be the file the plan was saved with"):
        Plan.load(tmp_path)
    tensors.unlink()
    with pytest.raises(PlanError, match=r"plan\.safetensors: missing; the plan's tensors must lie"):
        Plan.load(tmp_path)


def test_from_dict_needs_the_tensors():
    plan = Plan.load(GOLDEN)
    assert Plan.from_dict(plan.to_dict(), plan.tensors()) == plan
    with pytest.raises(PlanError, match="blocks: no tensor"):
        Plan.from_dict(plan.to_dict())


# --- saving


def test_save_makes_folders_and_refuses_to_overwrite(tmp_path):
    file = tmp_path / "a" / "b" / "plan.json"
    small().save(file)
    with pytest.raises(PlanError, match="exists already; pass overwrite=True"):
        small(density=0.25).save(file)
    assert Plan.load(file).density == 0.5
    small(density=0.25).save(file, overwrite=True)
    assert Plan.load(file).density == 0.25


def test_save_refuses_to_overwrite_a_tensor_file_that_lies_there(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(PlanError, match=r"model\.safetensors: exists already"):
        Plan.load(GOLDEN).save(tmp_path / "model.json")
    small().save(tmp_path / "model.json", overwrite=True)  # it has no tensors
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("name", "words"),
    [("plan.txt", "must end in .json"), ("plan", "must end in .json"), ("d.json", "is a folder")],
)
def test_save_refuses_a_name_that_is_no_plan(name, words, tmp_path):
    (tmp_path / "d.json").mkdir()
    with pytest.raises(PlanError, match=words):
        small().save(tmp_path / name)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_midway_leaves_the_old_file(call, tmp_path, monkeypatch):
    small().save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    for plan in (small(density=0.25), Plan.load(GOLDEN)):
        with pytest.raises(PlanError, match="can't be written: No space left on device"):
            plan.save(tmp_path / "plan.json", overwrite=True)
    assert (tmp_path / "plan.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_save_that_is_interrupted_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small().save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


# --- round trips


def random_shape(rng: random.Random) -> Any:
    def axes(low: int, high: int) -> list[Any]:
        return [rng.choice([None, rng.randint(low, high)]) for _ in range(3)]

    def offset() -> tuple[int, int]:
        return (rng.randint(-9, 9), rng.randint(-9, 9))

    return rng.choice(
        [
            lambda: Dense(),
            lambda: Skip(),
            lambda: Window(*axes(0, 9)),
            lambda: Window(frames=(rng.uniform(-4, 4), rng.random())),
            lambda: SlidingTile(*axes(1, 9)),
            lambda: Stripe(time_width=rng.randint(1, 4), space_width=(0, 1), space_offset=offset()),
            lambda: Stencil.from_offsets(torch.randint(-3, 4, (rng.randint(1, 20), 3))),
            lambda: Vertical((2, 3, 4), tuple(sorted(rng.sample(range(24), 5)))),
            lambda: Blocks.from_mask(torch.rand(6, 6) > 0.5, (1, 2, 3)),
        ]
    )()


def random_pattern(rng: random.Random) -> Pattern:
    parts = tuple(random_shape(rng) for _ in range(rng.randint(2, 4)))
    shape = Union(parts) if rng.random() < 0.2 else parts[0]
    tile = tuple(rng.choice([None, 1, 4, 8]) for _ in range(3))
    cell = rng.choice([None, 1, 16])
    return Pattern(shape, tile, cell, rng.random() < 0.5, rng.choice([0, 1]))


def random_plan(seed: int) -> Plan:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pool = [random_pattern(rng) for _ in range(rng.randint(1, 12))]
    cuts = sorted({1.0, 0.0, *(rng.random() for _ in range(rng.randint(0, 4)))}, reverse=True)
    stages = []
    for high, low in itertools.pairwise(cuts):
        branches = rng.choice([["any"], ["cond", "uncond"], ["uncond"]])
        stages += [Stage(high, low, branch) for branch in branches]
    num_heads = rng.randint(1, 6)

    def head() -> HeadChoice:
        spare = rng.choice([None, rng.choice(pool)])
        spare_error = None if spare is None else rng.choice([None, rng.random()])
        return HeadChoice(rng.choice(pool), rng.choice([None, rng.random()]), spare, spare_error)

    def layers() -> dict[str, Any]:
        return {
            f"blocks.{i}.attn1": tuple(tuple(head() for _ in range(num_heads)) for _ in stages)
            for i in range(rng.randint(0, 4))
        }

    components = {
        name: component(
            num_heads=num_heads,
            stages=tuple(stages),
            layers=layers(),
            valid_tokens=(rng.randint(0, 99), rng.choice([None, 4096])),
            layout=TokenLayout.video(3, 5, 7, text_after=rng.randint(0, 3)),
        )
        for name in ["transformer", "transformer_2"][: rng.randint(1, 2)]
    }
    notes = {"seeds": [rng.getrandbits(64)], "text": "ein\tüber 猫\n", "x": rng.random(), "n": None}
    return Plan("", components, rng.random(), provenance=notes, cost={"a": [{"b": [1, 2.5e-7]}]})


@pytest.mark.parametrize("seed", range(40))
def test_random_plan_survives_the_round_trip(seed, tmp_path):
    plan = random_plan(seed)
    plan.save(tmp_path / "a.json")
    again = Plan.load(tmp_path / "a.json")
    assert again == plan and diff(plan, again) == []
    assert again.fingerprint() == plan.fingerprint()
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    for x, y in zip(plan.components.values(), again.components.values(), strict=True):
        for layer in x.layers:
            for sigma in (0.0, 0.3, 1.0):
                assert x.patterns(layer, sigma, "uncond") == y.patterns(layer, sigma, "uncond")


def test_notes_are_copied_and_take_only_what_json_has():
    seeds = (1, 2)
    plan = small(provenance={"seeds": seeds})
    assert plan.provenance == {"seeds": [1, 2]}
    with pytest.raises(PlanError, match=r"cost\.x: must be plain numbers or text, got Tensor"):
        small(cost={"x": torch.zeros(1)})
    with pytest.raises(PlanError, match=r"measured\.psnr: a number must be finite, got inf"):
        small(measured={"psnr": float("inf")})
    with pytest.raises(PlanError, match="forecast: a key must be text, got 1"):
        small(forecast={1: 2})


def test_a_document_is_parsed_as_it_was_rendered():
    text = {"version": 1, "prompts": ["a" * 60, "b" * 60], "deep": {"x": {"y": [{}, [], 1.0]}}}
    assert parse(render(text)) == text
    assert render(parse(render(text))) == render(text)


# --- building one by hand


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": True}, "num_heads must be an integer from 1 to 1024, got True"),
        ({"head_dim": 0}, "head_dim must be an integer"),
        ({"model_class": "a b"}, "model_class: must match"),
        ({"config_hash": HASH + "\n"}, "config_hash: must match"),
        ({"stages": ()}, "stages: must be 1 to 256, got 0"),
        ({"stages": (Stage(1.0, 0.0),)}, 'layers."blocks.0.attn1": must have 1 stages, got 2'),
        ({"stages": (Stage(0.5, 0.0), Stage(1.0, 0.5))}, "must be ordered from high to low"),
        ({"stages": (Stage(1.0, 0.5), Stage(0.6, 0.0))}, "must not overlap"),
        ({"stages": (Stage(1.0, 0.0), Stage(1.0, 0.5, "cond"))}, "must not overlap"),
        ({"num_heads": 3}, 'layers."blocks.0.attn1"[0]: must have 3 heads, got 2'),
        ({"layers": {"a b": ()}}, "layers: must match"),
        ({"valid_tokens": (8, 4)}, "valid_tokens: the maximum must be >= the minimum, got 8 and 4"),
        ({"valid_tokens": (-1, None)}, "valid_tokens: the minimum must be an integer from 0"),
    ],
)
def test_a_wrong_component_cannot_be_built(changes, words):
    with pytest.raises(PlanError) as caught:
        component(**changes)
    assert_refused(str(caught.value), words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stage(0.5, 0.5), "0 <= sigma_min < sigma_max <= 1"),
        (lambda: Stage(float("nan"), 0.0), "sigma_max must be a finite number, got nan"),
        (lambda: Stage(True, 0.0), "sigma_max must be a finite number, got True"),
        (lambda: Stage(1.0, 0.0, "both"), "branch must be one of"),
        (lambda: HeadChoice(DENSE, error=-1.0), "error must be >= 0, got -1.0"),
        (lambda: HeadChoice(DENSE, error=float("inf")), "error must be a finite number"),
        (lambda: HeadChoice(DENSE, runner_up_error=0.5), "must be None without a runner_up"),
        (lambda: small(density=1.01), "density: must be a number from 0 to 1, got 1.01"),
        (lambda: small(density=True), "density: must be a number"),
        (lambda: small(components={}), "components: must name at least one transformer"),
        (lambda: small(components={"../x": component()}), "components: must match"),
        (lambda: small(forecast={"speedup": "2x"}), "forecast.speedup: must be a number > 0"),
        (lambda: small(pipeline_class="a.b"), "pipeline_class: must match"),
    ],
)
def test_a_wrong_plan_cannot_be_built(make, words):
    with pytest.raises(PlanError) as caught:
        make()
    assert_refused(str(caught.value), words)


# --- comparing


def test_fingerprint_ignores_what_was_measured_and_the_order():
    other = component(layers={"a": component().layers["blocks.0.attn1"], **component().layers})
    turned = component(layers=dict(reversed(other.layers.items())))
    a, b = small(components={"transformer": other}), small(components={"transformer": turned})
    assert a.fingerprint() == b.fingerprint() != small().fingerprint()
    assert small(measured={"psnr": 30}, provenance={"x": 1}).fingerprint() == small().fingerprint()
    assert small(cost={"x": 1}).fingerprint() != small().fingerprint()


def test_diff_says_what_changed():
    old = component()
    heads = old.layers["blocks.0.attn1"]
    new = component(
        layers={
            "blocks.0.attn1": (tuple([HeadChoice(NEAR)] * 2), heads[1]),
            "blocks.1.attn1": heads,
        },
        head_dim=32,
    )
    assert diff(small(), small(components={"transformer": new}, density=0.25, cost={"a": 1})) == [
        "density: 0.5 -> 0.25",
        "transformer: head_dim: 24 -> 32",
        "transformer: blocks.0.attn1 (sigma 1 to 0.5) heads 0-1: dense -> window(frames=1, far=true)",
        "transformer: blocks.1.attn1: added",
        "cost: differs in a",
    ]
    assert diff(small(), small()) == []


def test_diff_of_stages_evidence_and_long_patterns():
    one = component(stages=(Stage(1.0, 0.0),), layers={"a": ((HeadChoice(DENSE, 0.5),) * 2,)})
    long = [Pattern(Stencil(tuple((0, i, 0, 1) for i in range(-60, n)))) for n in (60, 61)]

    def plan(*heads: HeadChoice) -> Plan:
        return small(components={"transformer": dataclasses.replace(one, layers={"a": (heads,)})})

    def lines(a: Plan, b: Plan) -> str:
        return "\n".join(diff(a, b))

    assert "stage (sigma 0.5 to 0): removed" in lines(small(), plan(*one.layers["a"][0]))
    changed = lines(
        plan(*one.layers["a"][0]), plan(HeadChoice(DENSE, 0.25), HeadChoice(DENSE, 0.5))
    )
    assert changed == "transformer: a (sigma 1 to 0) head 0: evidence differs"
    line = lines(plan(*[HeadChoice(long[0])] * 2), plan(*[HeadChoice(long[1])] * 2))
    before, after = line.split(" -> ")
    assert before.split("heads 0-1: ")[1] != after and len(line) < 300


def test_merge_puts_transformers_together():
    a = small(forecast={"speedup": 1.5})
    b = small(components={"transformer_2": component()}, density=0.25, measured={"psnr": 30.0})
    both = merge(a, b)
    assert list(both.components) == ["transformer", "transformer_2"]
    assert both.density == 0.375 and both.forecast == {} and both.measured == {}
    assert [part["components"] for part in both.provenance["merged"]] == [
        ["transformer"],
        ["transformer_2"],
    ]
    assert both.provenance["merged"][1]["measured"] == {"psnr": 30.0}
    assert merge(a) == a


def test_merge_refuses_what_contradicts():
    with pytest.raises(PlanError, match="at least one plan"):
        merge()
    with pytest.raises(
        PlanError, match="must be for one pipeline, got WanPipeline and LTXPipeline"
    ):
        merge(small(), small(pipeline_class="LTXPipeline"))
    with pytest.raises(PlanError, match="two disagree on 'transformer'; leave one of them out"):
        merge(small(), small(components={"transformer": component(head_dim=32)}))


def test_summary_rows():
    first, second = summary_rows(small())
    assert first["patterns"] == {"dense": 2} and first["error"] is None
    assert second["patterns"] == {"window+far": 1, "dense": 1}
    assert (second["sigma"], second["error"], second["max_error"]) == ("0.5 to 0", 0.125, 0.125)


# --- the model it is for


FACTS: dict[str, Any] = {
    "model_class": "WanTransformer3DModel",
    "config_hash": HASH,
    "num_heads": 2,
    "head_dim": 24,
    "layer_names": ["blocks.0.attn1", "blocks.1.attn1"],
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_class": "LTX"}, "class must be WanTransformer3DModel as in the plan, got LTX"),
        ({"num_heads": 12}, "number of heads must be 2 as in the plan, got 12"),
        ({"head_dim": 128}, "head_dim must be 24 as in the plan, got 128"),
        ({"layer_names": ["blocks.00.attn1"]}, "1 are not, first 'blocks.0.attn1'"),
        ({"config_hash": "f" * 64}, "config_hash must be 0123456789ab... as in the plan"),
    ],
)
def test_another_model_is_refused(changes, words):
    small().check_model("transformer", **FACTS)
    with pytest.raises(PlanError) as caught:
        small().check_model("transformer", **(FACTS | changes))
    assert_refused(str(caught.value), words, "transformer: ", "use a plan made for this")


def test_another_pipeline_is_refused():
    with pytest.raises(
        PlanError, match=r"must have a part for 'transformer_2', got \['transformer'\]"
    ):
        small().check_model("transformer_2", **FACTS)


def test_config_hash_counts_what_the_model_is():
    config = {"num_layers": 2, "patch_size": (1, 2, 2), "eps": 1e-6, "_class_name": "Wan"}
    same = {
        "eps": 1e-6,
        "patch_size": [1, 2, 2],
        "num_layers": 2,
        "_name_or_path": "x",
        "new": None,
    }
    assert config_hash(config) == config_hash(same)
    assert config_hash(config) != config_hash(config | {"num_layers": 3})
    assert len(config_hash(config)) == 64
    with pytest.raises(PlanError, match=r"config\.dtype: must be plain numbers or text"):
        config_hash({"dtype": torch.float32})


# --- names


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Profiles with one built-in plan, and an empty working folder."""
    small().save_pretrained(tmp_path / "profiles" / "tiny-wan-1.3b")
    (tmp_path / "profiles" / "no-plan").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(hub, "shipped", lambda name: tmp_path / name)
    return tmp_path


def test_from_pretrained_takes_a_path_before_a_built_in_name(shelf):
    assert built_in() == ["tiny-wan-1.3b"]
    assert Plan.from_pretrained("tiny-wan-1.3b") == small()
    small(density=0.25).save_pretrained("tiny-wan-1.3b")
    assert Plan.from_pretrained("tiny-wan-1.3b").density == 0.25
    assert Plan.from_pretrained(Path("tiny-wan-1.3b") / "plan.json").density == 0.25


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../profiles/x",
        "no-plan",
        "a/../b",
        "a/b/c",
        "/etc/x",
        "a\\b",
        "x.json",
        "a/x.json",
    ],
)
def test_from_pretrained_refuses_what_is_no_name(name, shelf):
    with pytest.raises(PlanError, match=r"no plan|no such plan file") as caught:
        Plan.from_pretrained(name)
    assert "\n" not in str(caught.value)


class FakeHub(types.ModuleType):
    """As much of huggingface_hub as plans use, on a local folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder = folder
        self.HfApi = lambda: self

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        if not (self.folder / repo_id).exists():
            raise ConnectionError(f"no network\nfor {repo_id}")
        assert options["allow_patterns"] == ["plan.json", "plan.safetensors"]
        return str(self.folder / repo_id)

    def create_repo(self, repo_id: str, **_: Any) -> None:
        (self.folder / repo_id).mkdir(parents=True)

    def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> str:
        for file in Path(folder_path).iterdir():
            (self.folder / repo_id / file.name).write_bytes(file.read_bytes())
        return f"https://hub/{repo_id}/commit/1"


def test_plans_go_to_the_hub_and_come_back(shelf, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(shelf / "hub"))
    plan = Plan.load(GOLDEN)
    assert plan.push_to_hub("someone/wan-plan") == "https://hub/someone/wan-plan/commit/1"
    assert Plan.from_pretrained("someone/wan-plan") == plan
    with pytest.raises(PlanError, match="the hub didn't give it: ConnectionError: no network"):
        Plan.from_pretrained("someone/else")
    (shelf / "hub" / "someone" / "empty").mkdir()
    with pytest.raises(PlanError, match=r"must hold a plan\.json, and has none"):
        Plan.from_pretrained("someone/empty")
    with pytest.raises(PlanError, match=r"a hub id must be owner/name, got '\.\./x'"):
        plan.push_to_hub("../x")


def test_hub_names_need_the_hub_library(shelf, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PlanError, match="pip install huggingface_hub"):
        Plan.from_pretrained("someone/wan-plan")


# --- the module


def test_importing_plans_brings_no_host_library():
    code = (
        "import sys, sparse_dit.plan; "
        "print([m for m in ('diffusers', 'transformers', 'huggingface_hub', 'triton') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_plans_can_be_copied():
    plan = small()
    assert copy.deepcopy(plan) == plan and dataclasses.replace(plan, density=0.25) != plan
