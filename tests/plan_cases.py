"""A plan, its document and golden files, and how an error must read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage

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
