"""Plans: what the file says, and which stage of it applies to a call."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patterns import (
    BLOCKWISE,
    GEOMETRY,
    PATTERNS,
    Curve,
    Dense,
    Pattern,
    Skip,
    Stencil,
    Vertical,
    Window,
)
from sparse_dit.plan import Plan
from sparse_dit.plan.document import render
from sparse_dit.resources import shipped
from tests.helpers.plan_cases import (
    FINGERPRINT,
    GOLDEN,
    GOLDEN_2,
    GOLDEN_3,
    GOLDEN_BLOCKS,
    before_3,
    component,
)


def test_golden_file_holds_every_pattern():
    plan = Plan.load(GOLDEN)
    assert {p.name for p in plan.components["transformer"].distinct_patterns} == GEOMETRY.keys()


@pytest.mark.parametrize("golden", [GOLDEN_3, GOLDEN_BLOCKS], ids=lambda file: file.name)
def test_golden_files_of_version_3_load_and_save_to_the_same_bytes(golden, tmp_path):
    plan = Plan.load(golden)
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == golden.read_bytes()
    names = {p.name for p in plan.components["transformer"].distinct_patterns}
    assert golden is GOLDEN_3 or names >= BLOCKWISE.keys()


@pytest.mark.parametrize(("file", "version"), [(GOLDEN, 1), (GOLDEN_2, 2)])
def test_a_plan_of_an_old_version_is_saved_in_version_3_and_says_the_same(file, version, tmp_path):
    plan = Plan.load(file)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path) == plan
    document = json.loads((tmp_path / "plan.json").read_bytes())
    assert document["version"] == 3
    assert render(before_3(document, version)) == file.read_bytes()
    if plan.tensors():
        saved = (tmp_path / "plan.safetensors").read_bytes()
        assert saved == file.with_suffix(".safetensors").read_bytes()


SHIPPED = {  # SHA-256 of the file as the version wrote it that the plan was first saved in
    "cogvideox1.5-5b-geometry": (
        1,
        "855bd55111ae89e4b1c467203a70302ee8e6be396cb07e1ba3a7c1bd6c805a01",
    ),
    "hunyuanvideo-geometry": (
        1,
        "7f1fe242144a95b6ca67b53e1bd9a23b07167d70975fe3b2052faa0d8bfac3e5",
    ),
    "ltx-video-2b-geometry": (
        1,
        "dd984590499125a12f37fb188dae0a8ec710ddc5fc24a68ddfde9f9a4ac7b439",
    ),
    "tiny-wan": (2, "818a70a3e4787745b9df8bfc18eca9417efd45d5403efadeb32d282af68f3e41"),
    "wan2.1-t2v-1.3b-geometry": (
        1,
        "5c3b43b9391bf7e2994db30ea174e31fd2256243ae8a7f8734c31ce18be5e509",
    ),
    "wan2.1-t2v-14b-geometry": (
        1,
        "61b1e4f3de236c8b76fcea9dc85ff3214371721d7cb0b8020f7b25dc6f5d0131",
    ),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_plan_says_what_it_said_in_the_version_it_was_first_saved_in(name):
    version, digest = SHIPPED[name]
    document = json.loads((shipped("profiles") / name / "plan.json").read_bytes())
    assert hashlib.sha256(render(before_3(document, version))).hexdigest() == digest


def test_the_golden_file_of_version_3_means_what_it_says():
    plan = Plan.load(GOLDEN_3)
    part, model = plan.components.values()
    assert part.layout == TokenLayout.sequence(2048) and part.kind == "diffusion_transformer"
    assert part.heads == {"blocks.0.attn1": (3, 24), "blocks.1.attn1": (2, 64)}
    assert part.stage(0.5, "uncond") == 2
    assert len(part.patterns("blocks.0.attn1", 0.5, "cond") or ()) == 3
    first, second = part.layers["blocks.1.attn1"][1]
    assert first.pattern == Pattern(Stencil(((0, 0, -8, 1), (0, 0, -1, 3))), (1, 1, 64), far=True)
    assert (
        first.runner_up
        == second.pattern
        == Pattern(Vertical((1, 1, 64), (0, 5, 31)), (1, 1, 64), 16)
    )
    assert model.kind == "language_model"
    assert [stage.phase for stage in model.stages] == ["prefill", "decode"]
    assert model.layout.segments == (Segment.global_(16), Segment.grid(1, 1, 4080))


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
    page = (Path(__file__).parents[2] / "profiles" / "README.md").read_text(encoding="utf-8")
    example = page.split("```json\n")[1].split("```")[0]
    (tmp_path / "example.json").write_text(example, encoding="utf-8")
    Plan.load(tmp_path / "example.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == example


def test_the_format_description_names_every_pattern_and_parameter():
    page = (Path(__file__).parents[2] / "profiles" / "README.md").read_text(encoding="utf-8")
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
