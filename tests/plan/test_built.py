"""Plans: built by hand, compared, merged, and held against a model."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from sparse_dit.patterns import (
    Budget,
    ByKey,
    ByQuery,
    Grid,
    OwnPart,
    Pattern,
    PooledBlocks,
    Share,
    SinkWindow,
    Stencil,
    VerticalSlash,
    Window,
)
from sparse_dit.patterns.estimated import density
from sparse_dit.plan import (
    HeadChoice,
    Plan,
    PlanError,
    Stage,
    config_hash,
    diff,
    merge,
    summary_rows,
)
from sparse_dit.resources import shipped
from tests.helpers.plan_cases import DENSE, HASH, NEAR, assert_refused, component, small

FIRST = "blocks.0.attn1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": {FIRST: (True, 8)}}, "num_heads must be an integer from 1 to 1024, got True"),
        ({"heads": {FIRST: (2, 0)}}, 'heads."blocks.0.attn1": head_dim must be an integer'),
        ({"heads": {}}, 'heads."blocks.0.attn1": must be there as in layers'),
        ({"kind": "vae"}, "kind must be one of ('diffusion_transformer', 'language_model')"),
        ({"stages": (Stage(1.0, 0.0, phase="prefill"),)}, "only those of a language_model have a"),
        ({"model_class": "a b"}, "model_class: must match"),
        ({"config_hash": HASH + "\n"}, "config_hash: must match"),
        ({"stages": ()}, "stages: must be 1 to 256, got 0"),
        ({"stages": (Stage(1.0, 0.0),)}, 'layers."blocks.0.attn1": must have 1 stages, got 2'),
        ({"stages": (Stage(0.5, 0.0), Stage(1.0, 0.5))}, "must be ordered from high to low"),
        ({"stages": (Stage(1.0, 0.5), Stage(0.6, 0.0))}, "must not overlap"),
        ({"stages": (Stage(1.0, 0.0), Stage(1.0, 0.5, "cond"))}, "must not overlap"),
        ({"heads": {FIRST: (3, 24)}}, 'layers."blocks.0.attn1"[0]: must have 3 heads, got 2'),
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
        (lambda: Stage(0.5, 0.5), "0 <= progress_min < progress_max <= 1"),
        (lambda: Stage(float("nan"), 0.0), "progress_max must be a finite number, got nan"),
        (lambda: Stage(True, 0.0), "progress_max must be a finite number, got True"),
        (lambda: Stage(1.0, 0.0, "both"), "branch must be one of"),
        (lambda: Stage(1.0, 0.0, phase="both"), "phase must be one of"),
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
        heads=dict.fromkeys((FIRST, "blocks.1.attn1"), (2, 32)),
    )
    assert diff(small(), small(components={"transformer": new}, density=0.25, cost={"a": 1})) == [
        "density: 0.5 -> 0.25",
        "transformer: heads of 1 layers: 2 of 24 channels -> 2 of 32",
        "transformer: blocks.0.attn1 (progress 1 to 0.5) heads 0-1: dense -> window(frames=1, far=true)",
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

    assert "stage (progress 0.5 to 0): removed" in lines(small(), plan(*one.layers["a"][0]))
    changed = lines(
        plan(*one.layers["a"][0]), plan(HeadChoice(DENSE, 0.25), HeadChoice(DENSE, 0.5))
    )
    assert changed == "transformer: a (progress 1 to 0) head 0: evidence differs"
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
        merge(small(), small(components={"transformer": component(heads={FIRST: (2, 32)})}))


def test_summary_rows():
    first, second = summary_rows(small())
    assert first["patterns"] == {"dense": 2} and first["error"] is None
    assert second["patterns"] == {"window+far": 1, "dense": 1}
    assert (second["progress"], second["error"], second["max_error"]) == ("0.5 to 0", 0.125, 0.125)


# --- the model it is for


FACTS: dict[str, Any] = {
    "model_class": "WanTransformer3DModel",
    "config_hash": HASH,
    "heads": {"blocks.0.attn1": (2, 24), "blocks.1.attn1": (2, 24)},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_class": "LTX"}, "class must be WanTransformer3DModel as in the plan, got LTX"),
        (
            {"heads": {FIRST: (12, 24)}},
            "number of heads must be 2 as in the plan, got 12 in blocks.0",
        ),
        ({"heads": {FIRST: (2, 128)}}, "head_dim must be 24 as in the plan, got 128"),
        ({"heads": {"blocks.00.attn1": (2, 24)}}, "1 are not, first 'blocks.0.attn1'"),
        ({"config_hash": "f" * 64}, "config_hash must be 0123456789ab... as in the plan"),
    ],
)
def test_another_model_is_refused(changes, words):
    small().check_model("transformer", **FACTS)
    with pytest.raises(PlanError) as caught:
        small().check_model("transformer", **(FACTS | changes))
    assert_refused(str(caught.value), words, "transformer: ", "use a plan made for this")


def test_each_layer_is_held_against_its_own_heads():
    layers = {FIRST: component().layers[FIRST], "b": ((HeadChoice(DENSE),),) * 2}
    heads = {FIRST: (2, 24), "b": (1, 48)}
    plan = small(components={"transformer": component(layers=layers, heads=heads)})
    plan.check_model("transformer", **(FACTS | {"heads": heads}))
    with pytest.raises(PlanError, match="head_dim must be 48 as in the plan, got 24 in b;"):
        plan.check_model("transformer", **(FACTS | {"heads": {**heads, "b": (1, 24)}}))


def test_stages_of_two_phases_may_overlap_and_of_one_may_not():
    prefill, decode = (Stage(1.0, 0.0, phase=phase) for phase in ("prefill", "decode"))
    heads = component().layers[FIRST]
    component(kind="language_model", stages=(prefill, decode), layers={FIRST: heads})
    with pytest.raises(PlanError, match=r"stages\[1\]: must not overlap stages\[0\]"):
        component(kind="language_model", stages=(Stage(1.0, 0.0), prefill), layers={FIRST: heads})


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


class Packing(enum.Enum):
    ROWS = "rows"


@pytest.mark.parametrize(
    "stored",
    [
        {"quantization_config": object()},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"dtype": torch.bfloat16},
        {"torch_dtype": "float16"},
        {"some_new_dtype": torch.float8_e4m3fn, "place": torch.device("cpu")},
        {"_name_or_path": Path("here"), "_pre_quantization_dtype": torch.float32},
    ],
    ids=lambda stored: "+".join(stored),
)
def test_config_hash_does_not_count_how_weights_are_stored(stored):
    config = {"num_layers": 2, "patch_size": (1, 2, 2)}
    assert config_hash(config | stored) == config_hash(config)


@pytest.mark.parametrize(
    ("value", "saved"),
    [
        (np.int64(3), 3),
        (np.array([1, 2]), [1, 2]),
        (Packing.ROWS, "rows"),
        ({0: "a"}, {"0": "a"}),
        ({"kinds": {"b", "a"}}, {"kinds": ["a", "b"]}),
        (MappingProxyType({"x": torch.float16}), {"x": "torch.float16"}),
        (float("inf"), float("inf")),
    ],
    ids=["integer", "array", "enum", "mapping", "set", "dtype", "infinity"],
)
def test_config_hash_takes_a_value_as_its_file_would_hold_it(value, saved):
    assert config_hash({"x": value}) == config_hash({"x": saved}) != config_hash({"x": 4})


def test_a_configuration_that_tells_no_model_is_refused_by_the_name_of_its_key():
    with pytest.raises(PlanError, match=r"config\.rope\.kind: .*got object; .*\(rope=None\)"):
        config_hash({"rope": {"kind": object()}})


def test_config_hash_of_a_shipped_plans_model_is_what_it_was():
    plan = Plan.from_pretrained("tiny-wan").components["transformer"]
    config = json.loads((shipped("tiny_wan") / "transformer" / "config.json").read_text())
    assert config_hash(config) == plan.config_hash


def test_a_layer_is_estimated_as_a_whole_or_not_at_all():
    found, near = Pattern(VerticalSlash()), Pattern(Window(frames=1))
    layers = {
        FIRST: ((HeadChoice(found), HeadChoice(DENSE)), (HeadChoice(near), HeadChoice(DENSE)))
    }
    component(layers=layers)
    layers[FIRST] = ((HeadChoice(found), HeadChoice(near)), layers[FIRST][1])
    with pytest.raises(PlanError, match=r"got \['vertical_slash', 'window'\]"):
        component(layers=layers)


@pytest.mark.parametrize(
    "shape",
    [
        SinkWindow(sinks=4, budget=Budget(alpha=-3.0, beta=0.5, least=16, most=4096)),
        VerticalSlash(rows="last", sampled=32, budget=Share(0.95, 128), sinks=0, local=512),
        VerticalSlash(budget=Share()),
        PooledBlocks(),
        Grid(horizontal=True, slash=False, budget=Budget(beta=0.25)),
        OwnPart(sinks=4),
        ByKey(text=VerticalSlash(budget=Share()), image=Grid()),
        ByQuery(text=ByKey(video=SinkWindow()), image=OwnPart(), video=Grid()),
        ByQuery(),
    ],
)
def test_what_is_estimated_is_written_and_read(shape):
    pattern = Pattern(shape)
    assert Pattern.from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
    assert pattern.is_estimated and pattern.version == 3


def test_about_how_much_a_text_costs_is_known_of_every_shape():
    near = SinkWindow(budget=Budget(beta=0.5, least=1))
    found = [
        near,
        ByQuery(text=near),
        ByKey(text=near),
        OwnPart(),
        ByQuery(video=near),
        Grid(budget=near.budget),
    ]
    assert [density(shape, 4096) for shape in found] == [0.75, 0.75, 0.75, 1.0, 1.0, 0.75]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"name": "by_query", "sound": {"name": "dense"}}, "by_query: sound: Unexpected"),
        ({"name": "by_query", "text": "dense"}, "by_query: text"),
        ({"name": "by_query", "text": {"name": "window"}}, "by_query: text"),
        ({"name": "by_query", "text": {"name": "by_query"}}, "by_query: text"),
        ({"name": "by_key", "text": {"name": "by_key"}}, "by_key: text"),
        ({"name": "by_key", "text": {"name": "grid", "every": 2}}, "grid: every: Unexpected"),
        ({"name": "grid", "vertical": False, "slash": False}, "got none of them"),
    ],
)
def test_modalities_have_estimated_shapes(data, why):
    with pytest.raises(ValueError, match=why):
        Pattern.from_dict(data)


def test_what_is_estimated_has_no_tiles():
    with pytest.raises(
        ValueError, match=r"sink_window: takes none of a grid's parameters, got \['far'\]"
    ):
        Pattern(SinkWindow(), far=True)
    with pytest.raises(ValueError, match="most must be at least least, got 8 and 256"):
        Budget(most=8)
