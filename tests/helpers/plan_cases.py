"""A plan, its document and golden files, and how an error must read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage

GOLDEN = Path(__file__).parents[1] / "golden" / "plan_v1.json"
GOLDEN_2, GOLDEN_3 = (GOLDEN.with_name(f"plan_v{n}.json") for n in (2, 3))
GOLDEN_BLOCKS = GOLDEN.with_name("plan_v3_blocks.json")
HASH = "0123456789abcdef" * 4
FINGERPRINT = "1f66b5abafbe9f939d764b3f5a370643d17cd3546593c189d912c8168fc149f2"
DENSE, NEAR = Pattern(Dense()), Pattern(Window(frames=1), far=True)


def component(**changes: Any) -> ComponentPlan:
    values = {
        "model_class": "WanTransformer3DModel",
        "config_hash": HASH,
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
    values |= changes
    values.setdefault("heads", dict.fromkeys(values["layers"], (2, 24)))
    return ComponentPlan(**values)


def small(**changes: Any) -> Plan:
    values = {"pipeline_class": "WanPipeline", "components": {"transformer": component()}}
    return Plan(**(values | {"density": 0.5} | changes))


def before_3(document: dict[str, Any], version: int) -> dict[str, Any]:
    """A document of version 3 as an earlier version has it; for plans that one can say."""
    kinds, parts = {"global": "text", "grid": "video"}, {}
    for name, part in document["components"].items():
        said = part["layers"]
        ((num_heads, head_dim),) = {(x["num_heads"], x["head_dim"]) for x in said.values()}
        facts = {key: part[key] for key in ("model_class", "config_hash")}
        facts |= {"num_heads": num_heads, "head_dim": head_dim}
        facts["layout"] = {"segments": [[kinds[k], *n] for k, *n in part["layout"]["segments"]]}
        facts["valid_tokens"] = part["valid_tokens"]
        facts["stages"] = [
            {key.replace("progress", "sigma"): value for key, value in stage.items()}
            for stage in part["stages"]
        ]
        layers = {layer: x["patterns"] for layer, x in said.items()}
        parts[name] = facts | {key: part[key] for key in ("patterns", "layers", "evidence")}
        parts[name]["layers"] = layers
    return document | {"version": version, "components": parts}


def assert_refused(message: str, *words: str) -> None:
    """One line, printable, of bounded length, that says what the words say."""
    assert message.isprintable() and "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message


def document(file: Path = GOLDEN) -> dict[str, Any]:
    return json.loads(file.read_bytes())


def changed(*path: Any, to: Any, file: Path = GOLDEN) -> dict[str, Any]:
    """A golden document with one value replaced or added."""
    plan = document(file)
    target = plan
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = to
    return plan


def without(*path: Any, file: Path = GOLDEN) -> dict[str, Any]:
    plan = document(file)
    target = plan
    for step in path[:-1]:
        target = target[step]
    del target[path[-1]]
    return plan
