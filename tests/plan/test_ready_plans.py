"""The plans that ship for models which nothing was measured on: they say so, and they fit."""

import importlib.util
import shlex
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from search.ready import card, ready_plan, write
from sparse_dit import cli
from sparse_dit.index import pattern_index
from sparse_dit.integrations.diffusers import heads_of
from sparse_dit.patch import patch
from sparse_dit.plan import ANY_CONFIG, Plan, PlanError, built_in
from sparse_dit.runtime import NOT_COVERED, NOT_NAMED
from sparse_dit.search.geometry import NOTE
from tests.helpers.tiny_pipelines import BUILDERS, generate
from tests.helpers.tiny_video_pipelines import PIPELINES as VIDEO_PIPELINES
from tests.test_patch import drift

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "wan2.1-t2v-1.3b-geometry": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-t2v-14b-geometry": {},
    "hunyuanvideo-geometry": {},
    "cogvideox1.5-5b-geometry": {
        "num_attention_heads": 48, "num_layers": 42, "patch_size_t": 2, "sample_frames": 81,
        "sample_height": 96, "sample_width": 170, "use_rotary_positional_embeddings": True,
        "patch_bias": False,
    },
    "ltx-video-2b-geometry": {},
    "minimax-h3-geometry": {},
}  # fmt: skip
EACH = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch):
    """A recipe's own folder is where it imports from."""
    monkeypatch.syspath_prepend(ROOT / "search")


def published(name):
    """What the recipe of a plan knows of its model."""
    path = ROOT / "search" / f"{name.replace('.', '_').replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.MODEL.recipe == f"search/{path.name}"
    return module.MODEL


def model(name, **changes):
    """The model at its published size, without memory for its weights."""
    kind = getattr(diffusers, Plan.from_pretrained(name).components["transformer"].model_class)
    with torch.device("meta"):
        return kind(**{**CONFIGS[name], **changes})


def test_every_geometric_plan_is_tested():
    assert {name for name in built_in() if name.endswith("-geometry")} == CONFIGS.keys()


@EACH
def test_the_files_are_what_the_recipe_writes(name, tmp_path):
    facts = published(name)
    write(facts, tmp_path / "plan")
    for file in ("plan.json", "card.md"):
        shipped = ROOT / "profiles" / name / file
        assert (tmp_path / "plan" / file).read_bytes() == shipped.read_bytes()
    with pytest.raises(PlanError, match="exists"):
        write(facts, tmp_path / "plan")


@EACH
def test_it_patches_the_whole_model_and_says_what_it_is(name):
    transformer = model(name)
    plan = Plan.from_pretrained(name)
    part = plan.components["transformer"]
    config = transformer.config
    assert set(part.heads.values()) == {(config.num_attention_heads, config.attention_head_dim)}
    with patch(transformer, name) as handle:
        layers = [n for n, m in transformer.named_modules() if hasattr(m, "processor")]
        patched = [
            n
            for n in layers
            if "SparseDiT" in type(transformer.get_submodule(n).processor).__name__
        ]
        assert patched == list(published(name).layers)
        assert set(part.layers) == set(patched[1:]), "the first layer is dense"
        assert NOTE in str(handle.summary())


# tiny pipelines of the same class, at sizes whose windows don't cover all
LARGE = {"height": 512, "width": 512, "num_frames": 9, "guidance_scale": 1.0}
TINY = {
    "wan2.1-t2v-1.3b-geometry": ("wan", LARGE),
    "wan2.1-t2v-14b-geometry": ("wan", LARGE),
    "hunyuanvideo-geometry": ("hunyuan_video", LARGE),
    "cogvideox1.5-5b-geometry": ("cogvideox", LARGE),
    "ltx-video-2b-geometry": ("ltx", {"height": 64, "width": 64, "num_frames": 25}),
    "minimax-h3-geometry": ("minimax_h3", {"height": 768, "width": 128}),
}


@EACH
def test_it_runs_on_a_tiny_model_of_its_class(name):
    """Cut down to the tiny model's heads and layers."""
    family, size = TINY[name]
    pipe, call = {**VIDEO_PIPELINES, **BUILDERS}[family]()
    call = {**call, **size}
    stock = generate(pipe, call)
    plan = Plan.from_pretrained(name)
    part = plan.components["transformer"]
    heads = heads_of(pipe.transformer)
    layers = {
        n: tuple(row[:num_heads] for row in part.layers[n])
        for n, (num_heads, _) in heads.items()
        if n in part.layers
    }
    tiny = replace(part, heads=heads, layers=layers)
    with patch(pipe, replace(plan, components={"transformer": tiny})) as handle:
        sparse = generate(pipe, call)
    assert 0 < drift(sparse, stock) < 0.2
    ran = [r for r in handle.ran["transformer"] if r.dense_because is None]
    assert {r.layer for r in ran} == set(layers)
    assert 0.2 < sum(r.computed for r in ran) / sum(r.pairs for r in ran) < 0.95
    reasons = {r.dense_because for r in handle.ran["transformer"]} - {None}
    assert reasons <= {NOT_NAMED, NOT_COVERED}, "the first layer, and the noisiest steps"
    assert torch.equal(generate(pipe, call), stock)


@EACH
def test_its_density_is_that_of_its_geometry(name):
    """Counted anew, from the file alone."""
    plan = Plan.from_pretrained(name)
    part = plan.components["transformer"]
    (share,) = plan.provenance["stage_shares"]["transformer"]
    heads = [head for (stage,) in part.layers.values() for head in stage]
    sparse = sum(pattern_index(head.pattern, part.layout).density for head in heads)
    ((num_heads, _),) = set(part.heads.values())
    every = num_heads * (len(part.layers) + 1)
    density = 1 - share + share * (sparse + num_heads) / every
    assert plan.density == pytest.approx(density, abs=1e-6)
    assert 0.4 < plan.density < 0.7, "conservative"


@EACH
def test_dense_noise_levels_are_a_quarter_of_the_schedule(name):
    """On the host's own scheduler, at the published shift; one step more or less by rounding."""
    facts = published(name)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=facts.shift, shift_terminal=facts.terminal
    )
    scheduler.set_timesteps(sigmas=[1 - i / facts.steps for i in range(facts.steps)])
    dense = (scheduler.timesteps / 1000 > facts.sigma_max).sum().item()
    assert dense / facts.steps == pytest.approx(0.25, abs=1.5 / facts.steps)


@EACH
def test_it_promises_nothing(name):
    plan = Plan.from_pretrained(name)
    assert plan.forecast == {"note": NOTE}
    assert plan.measured == plan.cost == {}
    text = card(published(name))
    assert "**Uncalibrated: geometry only.**" in text
    assert "dB" not in text
    assert "speed-up" not in text.replace("it is no speed-up", "")


@EACH
def test_the_calibrating_command_is_one(name, monkeypatch, capsys):
    """Its options are the command line's; the model itself is on the hub."""
    words = shlex.split(Plan.from_pretrained(name).provenance["calibrate"])
    assert words[:2] == ["sparse-dit", "search"]
    words[2] = "no-such-folder/model"
    words[words.index("--prompts") + 1] = "no-such-file.txt"
    monkeypatch.chdir(ROOT)
    assert cli.run(words[1:]) != 0
    said = "".join(capsys.readouterr())
    assert "no-such-file.txt" in said
    assert "No such option" not in said


def test_show_says_what_it_is(capsys):
    assert cli.run(["show", "wan2.1-t2v-1.3b-geometry"]) == 0
    assert NOTE in capsys.readouterr().out


def test_any_configuration_with_these_heads_and_layers_fits():
    name = "wan2.1-t2v-1.3b-geometry"
    patch(model(name, in_channels=36, image_dim=1280), name).remove()
    with pytest.raises(PlanError, match="number of heads must be 12 as in the plan, got 40"):
        patch(model(name, num_attention_heads=40), name)
    with pytest.raises(PlanError, match="layers must be in the model, 1 are not"):
        patch(model(name, num_layers=29), name)


def test_a_plan_with_a_hash_still_needs_its_configuration():
    name = "wan2.1-t2v-1.3b-geometry"
    plan = ready_plan(published(name))
    part = replace(plan.components["transformer"], config_hash="1" * 64)
    assert plan.components["transformer"].config_hash == ANY_CONFIG
    with pytest.raises(PlanError, match="config_hash must be 111111111111"):
        patch(model(name), replace(plan, components={"transformer": part}))
