"""Plans: damaged and hostile files, paths and tensors, refused in one line."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as tensors_to_bytes

from sparse_dit.patterns import Blocks
from sparse_dit.plan import Plan, PlanError
from sparse_dit.plan.document import parse
from tests.helpers.plan_cases import (
    GOLDEN,
    GOLDEN_3,
    assert_refused,
    changed,
    document,
    small,
    without,
)

of_3 = functools.partial(changed, file=GOLDEN_3)
C = ("components", "transformer")
L0 = (*C, "layers", "blocks.0.attn1")
L1 = (*C, "layers", "blocks.1.attn1")
E0 = (*C, "evidence", "blocks.0.attn1")
IN = "components.transformer"
BAD_DOCUMENTS = {
    "no version": (without("version"), "version: missing"),
    "version 4": (changed("version", to=4), "version: must be 1, 2 or 3, got 4"),
    "version 1 as 3": (changed("version", to=3), f"{IN}: the key 'kind' is missing; add it"),
    "version true": (changed("version", to=True), "version: must be 1, 2 or 3, got True"),
    "version 1.0": (changed("version", to=1.0), "version: must be 1, 2 or 3, got 1.0"),
    "version text": (changed("version", to="1"), "version: must be 1, 2 or 3, got '1'"),
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
    "a head taken out by hand": (
        changed(*C, "layers", "blocks.0.attn1", 1, to=[0, 0]),
        f'{IN}.layers."blocks.0.attn1"[1]: must have 3 heads, got 2',
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
        f"{IN}.stages[0]: a stage must have 0 <= progress_min < progress_max <= 1",
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


P0 = (*L0, "patterns")
BAD_DOCUMENTS |= {
    f"version 3: {name}": (of_3(*path, **to) if to else without(*path, file=GOLDEN_3), words)
    for name, path, to, words in [
        ("as version 2", ("version",), {"to": 2}, f"{IN}: the key 'num_heads' is missing; add it"),
        ("no kind", (*C, "kind"), {}, f"{IN}: the key 'kind' is missing; add it"),
        (
            "unknown kind",
            (*C, "kind"),
            {"to": "vae"},
            f"{IN}.kind: must be 'diffusion_transformer'",
        ),
        ("heads of all", (*C, "num_heads"), {"to": 3}, f"{IN}: unknown key 'num_heads'; remove it"),
        ("no num_heads", (*L0, "num_heads"), {}, f'{IN}.layers."blocks.0.attn1": the key'),
        ("no head", (*L0, "num_heads"), {"to": 0}, '"blocks.0.attn1".num_heads: must be greater'),
        ("head_dim text", (*L0, "head_dim"), {"to": "24"}, ".head_dim: must be a valid integer"),
        ("head missing", (*P0, 0, 0), {}, '"blocks.0.attn1".patterns[0]: must have 3 heads, got 2'),
        ("stage missing", (*P0, 0), {}, '"blocks.0.attn1".patterns: must have 3 stages, got 2'),
        ("id too high", (*P0, 1, 0), {"to": 9}, '"blocks.0.attn1".patterns[1][0]: must be the num'),
        ("unknown key in layer", (*L0, "x"), {"to": 1}, "unknown key 'x'; remove it"),
        ("a list as layer", L0, {"to": [[0, 0, 0]]}, f'{IN}.layers."blocks.0.attn1": must be a'),
        ("sigma", (*C, "stages", 0, "sigma_max"), {"to": 1.0}, "[0]: unknown key 'sigma_max'"),
        ("above 1", (*C, "stages", 0, "progress_max"), {"to": 1.5}, "stages[0].progress_max: must"),
        ("unknown phase", (*C, "stages", 0, "phase"), {"to": "train"}, "stages[0].phase: must be"),
        ("phase", (*C, "stages", 0, "phase"), {"to": "decode"}, "only those of a language_model"),
        (
            "text",
            (*C, "layout", "segments", 0),
            {"to": ["text", 4]},
            "must be ['global', n] or ['gri",
        ),
        (
            "no grid",
            (*C, "layout", "segments", 0),
            {"to": ["grid", 0, 1, 1]},
            f"{IN}.layout: a seg",
        ),
    ]
}
BAD_DOCUMENTS["global in version 1"] = (
    changed(*C, "layout", "segments", 0, to=["global", 4]),
    f"{IN}.layout: a segment must be ['text', n] or ['video', frames, height, width], got",
)
BAD_DOCUMENTS["progress in version 1"] = (
    changed(*C, "stages", 0, "progress_max", to=1.0),
    f"{IN}.stages[0]: unknown key 'progress_max'",
)


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
    "two byte order marks": (2 * b"\xef\xbb\xbf" + GOOD, "not valid JSON"),
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


def test_many_random_losses_never_escape_as_another_error():
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


@pytest.mark.parametrize("file", [GOLDEN, GOLDEN_3], ids=lambda file: file.stem)
def test_any_value_in_any_place_is_a_plan_or_a_plan_error(file):
    rng = random.Random(1)
    tensors = Plan.load(file).tensors()
    weird = [None, True, -1, 0, 1, 2**63, 0.5, 1e308, "", "dense", "../x", [], [[]], {}, {"a": 1}]
    for _ in range(1000):
        plan = document(file)
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
