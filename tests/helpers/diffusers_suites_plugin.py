"""pytest plugin of `tests.helpers.diffusers_suites`: writes outcomes, and patches what tests build.

It runs in the process that runs diffusers' own tests, as a top-level module: the name `tests` is
theirs there. `SPARSE_DIT_OUTCOMES` names the file that it writes; with `SPARSE_DIT_DENSE=1` each
transformer of a supported class is patched with a dense plan as the last act of its `__init__`,
whoever calls it: a test, `from_config`, `from_pretrained`. What a test does to the model comes after
that. Copies, and models that a test pickles, carry the patch along; nothing else is changed.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers  # now: a checkout's conftest.py would put its own sources before the installed ones
import pytest
from torch import nn

import sparse_dit
from sparse_dit.integrations.diffusers import heads_of
from sparse_dit.layout import TokenLayout
from sparse_dit.patch import Handle
from sparse_dit.patterns import Dense, Pattern
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash

OUTCOMES, DENSE = "SPARSE_DIT_OUTCOMES", "SPARSE_DIT_DENSE"
SEVERITY = ("passed", "skipped", "failed", "error")

_outcomes: dict[str, tuple[str, str]] = {}  # by test: the worst of its phases, and the message
_handles: list[Handle] = []  # of the transformers that the present test built
_patched = 0
_calls: Counter[str] = Counter()  # attention calls by the reason that they ran dense


def dense_plan(transformer: Any) -> Plan:
    """A plan that names every self-attention layer of a transformer, and all heads dense."""
    heads, dense = heads_of(transformer), HeadChoice(Pattern(Dense()))
    part = ComponentPlan(
        model_class=type(transformer).__name__,
        config_hash=config_hash(transformer.config),
        heads=heads,
        layout=TokenLayout.video(1, 2, 2),
        stages=(Stage(1.0, 0.0),),
        layers={layer: ((dense,) * num_heads,) for layer, (num_heads, _) in heads.items()},
    )
    return Plan("Pipeline", {"transformer": part}, 1.0)


def patch_when_built(classes: list[type[nn.Module]]) -> None:
    """From now on each object of these classes is patched with a dense plan once it is built."""
    known = set(classes)
    for cls in classes:
        setattr(cls, "__init__", _patching(cls, known))  # noqa: B010


def _patching(cls: Any, known: set[type[nn.Module]]) -> Any:
    stock = cls.__init__

    @functools.wraps(stock)  # diffusers reads its signature
    def __init__(self, *args, **kwargs):
        global _patched
        stock(self, *args, **kwargs)
        if next(base for base in type(self).__mro__ if base in known) is cls:
            _handles.append(sparse_dit.patch(self, dense_plan(self)))
            _patched += 1

    return __init__


def pytest_configure() -> None:
    if os.environ.get(DENSE) == "1":
        known = sparse_dit.supported_models()
        models = [m for m in known if m.of_diffusers and m.reason is None]
        patch_when_built([getattr(diffusers, m.transformer) for m in models])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _outcomes[report.nodeid] = ("error", _message(report))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome: str = report.outcome
    if report.failed and report.when != "call":
        outcome = "error"
    before = _outcomes.get(report.nodeid, ("passed", ""))
    if SEVERITY.index(outcome) >= SEVERITY.index(before[0]):
        message = "" if report.passed else _message(report)
        _outcomes[report.nodeid] = (outcome, message or before[1])


def pytest_runtest_logfinish() -> None:
    for handle in _handles:
        for ran in handle.ran["transformer"]:
            _calls[ran.dense_because or "sparse"] += ran.calls
    _handles.clear()


def pytest_sessionfinish() -> None:
    written = {"tests": _outcomes, "patched": _patched, "calls": _calls}
    Path(os.environ[OUTCOMES]).write_text(json.dumps(written))


def _message(report: pytest.CollectReport | pytest.TestReport) -> str:
    """What an exception says, or why a test was skipped; of others the end of what pytest prints."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr))[-3000:]
