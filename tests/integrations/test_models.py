import importlib
import pkgutil
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models import transformers
from torch import nn

import sparse_dit
from sparse_dit import TokenLayout, cli
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.integrations.families.unqualified import UNQUALIFIED
from sparse_dit.patterns import Pattern, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from tests.helpers.tiny_pipelines import generate, wan

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"


def _transformers():
    """Every model class of diffusers' folder of transformers."""
    for module in pkgutil.iter_modules(transformers.__path__):
        scope = vars(importlib.import_module(f"{transformers.__name__}.{module.name}"))
        for name, found in scope.items():
            here = isinstance(found, type) and found.__module__.endswith("." + module.name)
            if here and issubclass(found, diffusers.ModelMixin):
                yield name


def test_the_known_classes_are_those_of_diffusers_each_in_one_list():
    """A new one of the host: add a family, or say in `unqualified.py` why not."""
    assert set(FAMILIES) & set(UNQUALIFIED) == set()
    others = {"SanaControlNetModel"}  # in the folder of controlnets
    assert {*FAMILIES, *UNQUALIFIED} - others == set(_transformers())
    assert others <= set(dir(diffusers))


def test_the_page_lists_what_is_known():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    known = [(m.transformer, m.reason or m.tested) for m in sparse_dit.supported_models()]
    assert rows == known


def test_the_command_prints_them(capsys):
    assert cli.run(["models"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*FAMILIES, *UNQUALIFIED)), said


def test_a_transformer_with_linear_attention_says_so():
    sana = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    with pytest.raises(
        NotImplementedError, match=r"^SanaTransformer2DModel can't be patched: .*linear"
    ):
        sparse_dit.patch(sana, "tiny-wan")


class Unknown(nn.Module):
    """Wan's transformer by another name, and no class that derives from it."""


@pytest.fixture
def unknown():
    """A pipeline whose transformer's class is unknown until it is added."""
    pipe, call = wan()
    stock = generate(pipe, call)
    cls = type(pipe.transformer)
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    pipe.transformer.__class__ = type("Unknown3DModel", cls.__bases__, body)
    yield pipe, call, stock
    FAMILIES.pop("Unknown3DModel", None)


def _grid(config, arguments):
    _, _, frames, height, width = arguments["hidden_states"].shape
    return TokenLayout.video(frames, height // 2, width // 2)


def test_an_unknown_class_is_patched_once_its_layout_is_given(unknown):
    pipe, call, stock = unknown
    head = HeadChoice(Pattern(Window(frames=0, rows=1, columns=1), tile=(1, 2, 2)))
    layers = {f"blocks.{n}.attn1": ((head, head),) for n in range(2)}
    digest, layout = config_hash(pipe.transformer.config), TokenLayout.video(5, 4, 4)
    part = ComponentPlan(
        "Unknown3DModel", digest, dict.fromkeys(layers, (2, 24)), layout, (Stage(1.0, 0.0),), layers
    )
    plan = Plan("WanPipeline", {"transformer": part}, 0.5)
    with pytest.raises(NotImplementedError, match="add_model"):
        sparse_dit.patch(pipe, plan)
    sparse_dit.add_model(type(pipe.transformer), r"blocks\.\d+\.attn1", _grid)
    with sparse_dit.patch(pipe, plan) as handle:
        sparse = generate(pipe, call)
    assert sparse.isfinite().all() and not torch.equal(sparse, stock)
    assert {ran.layer for ran in handle.ran["transformer"] if ran.backend} == set(layers)
    assert torch.equal(generate(pipe, call), stock)
    found = {m.transformer: m.tested for m in sparse_dit.supported_models()}
    assert found["Unknown3DModel"] == "nothing"


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"transformer": "Wan"}, TypeError, "class of torch modules"),
        ({"layers": "("}, ValueError, "regular expression"),
        ({"layout": None}, TypeError, "must be a function"),
        ({"max_step": 1}, TypeError, "max_step"),
        ({"transformer": diffusers.WanTransformer3DModel}, ValueError, "known already"),
    ],
)
def test_what_is_wrong_about_an_added_class_is_said(changed, error, words):
    given = {"transformer": Unknown, "layers": "a", "layout": _grid, **changed}
    with pytest.raises(error, match=words):
        sparse_dit.add_model(**given)
    assert "Unknown" not in FAMILIES
