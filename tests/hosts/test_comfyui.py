"""The node for ComfyUI, behind a stand-in of what it touches; the contract was read, not run."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from sparse_dit.attention import sparse_attention
from sparse_dit.hosts import comfyui
from sparse_dit.index import build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, SlidingTile, Window
from sparse_dit.plan import HeadChoice, Stage
from tests.helpers import host_stand_ins as stand_ins
from tests.helpers.plan_cases import component, small

GRID, HEADS, DIM = (3, 8, 8), 3, 16
TOKENS = math.prod(GRID)
PATTERNS = [
    Pattern(Window(rows=0, columns=0), tile=(1, 4, 4), far=True),
    Pattern(Dense()),
    Pattern(SlidingTile(1, 1, 1), tile=(1, 4, 4)),
]
OVERRIDE = comfyui.OVERRIDE


class Model:
    """ComfyUI's ModelPatcher, as far as a node touches it."""

    def __init__(self):
        self.model_options = {"transformer_options": {}}
        self.callbacks = {}

    def clone(self):
        cloned = Model()
        cloned.model_options = copy.deepcopy(self.model_options)
        cloned.callbacks = {kind: dict(keyed) for kind, keyed in self.callbacks.items()}
        return cloned

    def add_callback_with_key(self, kind, key, callback):
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def call(self, kind, *args):
        for callback in self.callbacks[kind][comfyui.KEY]:
            callback(*args)


class Events:
    ON_PREPARE_STATE, ON_CLEANUP = "on_prepare_state", "on_cleanup"


def plan_of(patterns=PATTERNS, stages=None, every=None):
    sparse, dense = tuple(map(HeadChoice, patterns)), (HeadChoice(Pattern(Dense())),) * HEADS
    stages = stages or (Stage(1.0, 0.5), Stage(0.5, 0.0))
    layers = {"blocks.0.attn1": (dense, sparse) if len(stages) == 2 else (sparse,)}
    part = component(
        layers=layers, heads={"blocks.0.attn1": (HEADS, DIM)}, stages=stages,
        layout=TokenLayout.video(*GRID), valid_tokens=(0, None),
    )  # fmt: skip
    return small(components={"transformer": part})


@pytest.fixture
def followed(tmp_path, monkeypatch):
    stand_ins._module(monkeypatch, "comfy.patcher_extension", CallbacksMP=Events)

    def follow(plan=None, model=None, **more):
        (plan or plan_of()).save(tmp_path / "plan.json", overwrite=True)
        node = comfyui.NODE_CLASS_MAPPINGS["SparseDitFollowPlan"]()
        given = {"model": model or Model(), "plan": str(tmp_path / "plan.json"), **more}
        (patched,) = getattr(node, node.FUNCTION)(**given)
        return patched

    return follow


def options_of(model, sigma=0.4, schedule=None, **more):
    """A forward's options: a copy of the model's, with what the sampler and the model add."""
    schedule = torch.tensor([1.0, 0.7, 0.4, 0.0]) if schedule is None else schedule
    added = {
        "sigmas": torch.tensor([sigma, sigma]), "sample_sigmas": schedule, "cond_or_uncond": [1, 0],
        "grid_sizes": torch.Size(GRID), "block_index": 0, "block_type": "double", "total_blocks": 1,
    }  # fmt: skip
    return {**model.model_options["transformer_options"], **added, **more}


def stock(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
          skip_output_reshape=False, **kwargs):  # fmt: skip
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def attention(q, k, v, heads, **kwargs):
    """As ComfyUI's wrapper hands a call to the override, if there is one."""
    override = kwargs["transformer_options"].get(OVERRIDE)
    kwargs["_inside_attn_wrapper"] = True
    if override is None:
        return stock(q, k, v, heads, **kwargs)
    return override(stock, q, k, v, heads, **kwargs)


def qkv(seed=0, tokens=TOKENS):
    torch.manual_seed(seed)
    return torch.randn(3, 2, tokens, HEADS * DIM).unbind()


def apart(x):
    return x.unflatten(2, (HEADS, DIM)).transpose(1, 2)


def wanted(q, k, v):
    index = build_index(PATTERNS, TokenLayout.video(*GRID))
    out = sparse_attention(apart(q), apart(k), apart(v), index, backend="reference")
    return out.transpose(1, 2).flatten(2)


def near(a, b):
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_a_models_attention_follows_the_plan(followed):
    model, (q, k, v) = Model(), qkv()
    patched = followed(model=model)
    assert OVERRIDE not in model.model_options["transformer_options"], "the clone alone is patched"
    near(attention(q, k, v, HEADS, transformer_options=options_of(patched)), wanted(q, k, v))
    out = attention(
        *map(apart, (q, k, v)), HEADS, skip_reshape=True, skip_output_reshape=True,
        transformer_options=options_of(patched),
    )  # fmt: skip
    near(out, apart(wanted(q, k, v)))
    out = attention(
        *map(apart, (q, k, v)), HEADS, skip_reshape=True, transformer_options=options_of(patched)
    )
    near(out, wanted(q, k, v))
    early = options_of(patched, sigma=0.9)
    assert torch.equal(attention(q, k, v, HEADS, transformer_options=early), stock(q, k, v, HEADS))


def other(func, q, *args, **kwargs):
    return func(q, *args, **kwargs) + 1


def test_it_is_chained_with_what_was_there_and_with_what_comes_later(followed):
    before, (q, k, v) = Model(), qkv()
    before.model_options["transformer_options"][OVERRIDE] = other
    patched = followed(model=before)
    near(attention(q, k, v, HEADS, transformer_options=options_of(patched)), wanted(q, k, v))
    early = options_of(patched, sigma=0.9)
    dense = stock(q, k, v, HEADS)
    assert torch.equal(attention(q, k, v, HEADS, transformer_options=early), dense + 1)

    later = patched.clone()
    later.model_options["transformer_options"][OVERRIDE] = other
    for _ in range(2):
        later.call(Events.ON_PREPARE_STATE, later, None, later.model_options)
    near(attention(q, k, v, HEADS, transformer_options=options_of(later)), wanted(q, k, v))
    early = options_of(later, sigma=0.9)
    assert torch.equal(attention(q, k, v, HEADS, transformer_options=early), dense + 1)


def test_cross_attention_and_blocks_without_a_plan_are_the_models_own(followed, caplog):
    patched, (q, k, v) = followed(), qkv()
    text = qkv(1, tokens=7)[0]
    options = options_of(patched)
    out = attention(q, text, text, HEADS, transformer_options=options)
    assert torch.equal(out, stock(q, text, text, HEADS))
    options = options_of(patched, block_index=1)
    assert torch.equal(
        attention(q, k, v, HEADS, transformer_options=options), stock(q, k, v, HEADS)
    )
    options = options_of(patched, block_type="single")
    assert torch.equal(
        attention(q, k, v, HEADS, transformer_options=options), stock(q, k, v, HEADS)
    )
    assert not caplog.records


DECLINED = {
    "block_index": {"block_index": None},
    "grid_sizes": {"grid_sizes": None},
    "sample_sigmas": {"sample_sigmas": None},
    "within 0 and 1": {"sigmas": torch.tensor([14.6])},
    "doesn't say where": {"grid_sizes": (2, 8, 8)},
    "but a grid of": {"grid_sizes": (4, 8, 8)},
}


@pytest.mark.parametrize("words", DECLINED)
def test_what_isnt_known_is_left_to_the_model_with_one_reason(words, followed, caplog):
    patched, (q, k, v) = followed(), qkv()
    for _ in range(2):
        options = options_of(patched) | DECLINED[words]
        out = attention(q, k, v, HEADS, transformer_options=options)
        assert torch.equal(out, stock(q, k, v, HEADS))
    assert len(caplog.records) == 1 and words in caplog.text


def test_calls_that_arent_plain_self_attention_are_left_to_the_model(followed, caplog):
    patched, (q, k, v) = followed(), qkv()
    mask = torch.zeros(TOKENS, TOKENS)
    attention(q, k, v, HEADS, mask=mask, transformer_options=options_of(patched))
    attention(q, k, v, HEADS, enable_gqa=True, transformer_options=options_of(patched))
    assert "with a mask" in caplog.text and "with enable_gqa" in caplog.text
    options = options_of(patched)
    near(attention(q, k, v, HEADS, transformer_options=options), wanted(q, k, v))
    again = attention(q, k, v, HEADS, transformer_options=options)
    assert torch.equal(again, stock(q, k, v, HEADS)), "a text of as many tokens as the video"
    assert "a second attention" in caplog.text


def test_branches_and_generations_are_told_apart(followed):
    kept = Pattern(SlidingTile(1, 1, 1), tile=(1, 4, 4), every=3)
    patched = followed(plan_of([kept] * HEADS, (Stage(1.0, 0.0),)))
    first, second = torch.tensor([1.0, 0.7, 0.4, 0.0]), torch.tensor([1.0, 0.7, 0.4, 0.0])

    def run(seed, sigma, schedule, side):
        options = options_of(patched, sigma, schedule, cond_or_uncond=[side])
        return attention(*qkv(seed), HEADS, transformer_options=options)

    a, b = run(0, 1.0, first, 0), run(1, 1.0, first, 1)
    assert not torch.equal(a, b)
    assert torch.equal(run(2, 0.7, first, 0), a)
    assert torch.equal(run(3, 0.7, first, 1), b)
    assert not torch.equal(run(4, 1.0, second, 0), a), "another generation"
    assert not torch.equal(run(5, 0.7, second, 1), b)
    c = run(6, 0.7, second, 0)
    patched.call(Events.ON_CLEANUP, patched)
    assert not torch.equal(run(7, 0.4, second, 0), c)


def test_a_step_cache_of_the_plan_is_said_to_be_another_nodes(followed, caplog):
    cache = {"name": "taylorseer", "interval": 2, "first": 3}
    patched, (q, k, v) = followed(replace(plan_of(), provenance={"step_cache": cache})), qkv()
    near(attention(q, k, v, HEADS, transformer_options=options_of(patched)), wanted(q, k, v))
    (record,) = caplog.records
    assert "step cache taylorseer=2:3, which ComfyUI doesn't take" in record.getMessage()
    assert "EasyCache" in record.getMessage()


def test_the_node_says_what_it_takes(followed):
    node = comfyui.NODE_CLASS_MAPPINGS["SparseDitFollowPlan"]
    assert comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys() == comfyui.NODE_CLASS_MAPPINGS.keys()
    assert set(node.INPUT_TYPES()["required"]) == {"model", "plan"}
    part = plan_of().components["transformer"]
    two = small(components={"transformer": part, "transformer_2": part})
    with pytest.raises(ValueError, match="component must be one of"):
        followed(two)
    followed(two, component="transformer_2")
