"""Equal neighbouring stages become one: fewer stages, the same patterns everywhere."""

import itertools
from dataclasses import replace

import pytest

from sparse_dit.patterns import Dense, Pattern, Skip, Window
from sparse_dit.plan import HeadChoice, Plan, Stage, merged, merged_plan
from sparse_dit.plan.merged import equal_stages
from tests.eval_cases import made_up_plan

A, B = Pattern(Window(1)), Pattern(Skip(), far=True)


def _component(rows, stages=None):
    """Two layers of two heads; `rows` are the patterns of the first layer's second head."""
    part = made_up_plan().components["transformer"]
    edges = [1 - n / len(rows) for n in range(len(rows) + 1)]
    stages = stages or [Stage(h, low) for h, low in itertools.pairwise(edges)]
    layers = {
        "one": tuple((HeadChoice(A, 0.1 * n), HeadChoice(p)) for n, p in enumerate(rows)),
        "two": tuple((HeadChoice(B), HeadChoice(A)) for _ in rows),
    }
    return replace(part, num_heads=2, stages=tuple(stages), layers=layers)


@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        ("A", [[0]]),
        ("AB", [[0], [1]]),
        ("AAB", [[0, 1], [2]]),
        ("ABBBA", [[0], [1, 2, 3], [4]]),
        ("AAAA", [[0, 1, 2, 3]]),
    ],
)
def test_runs_of_equal_stages_become_one(rows, runs):
    before = _component([{"A": A, "B": B}[name] for name in rows])
    after = merged(before)
    assert equal_stages(before) == runs and len(after.stages) == len(runs)
    for sigma in [n / 100 for n in range(101)]:
        for layer in before.layers:
            assert after.patterns(layer, sigma) == before.patterns(layer, sigma)
    assert merged(after) == after


def test_a_difference_in_one_layer_keeps_stages_apart():
    before = _component([A, A])
    second = ((HeadChoice(B), HeadChoice(A)), (HeadChoice(B), HeadChoice(Pattern(Dense()))))
    assert len(merged(replace(before, layers={**before.layers, "two": second})).stages) == 2


def test_stages_that_do_not_touch_stay_apart():
    part = _component([A, A], [Stage(1.0, 0.6), Stage(0.5, 0.0)])
    assert merged(part) is part


def test_branches_are_merged_apart():
    stages = [Stage(h, h - 0.5, b) for h in (1.0, 0.5) for b in ("cond", "uncond")]
    after = merged(_component([A, B, A, B], stages))
    assert after.stages == (Stage(1.0, 0.0, "cond"), Stage(1.0, 0.0, "uncond"))
    assert after.patterns("one", 0.2, "cond")[1] == A
    assert after.patterns("one", 0.2, "uncond")[1] == B
    after = merged(_component([A, B, A, A], stages))
    assert [str(s) for s in after.stages] == [
        "sigma 1 to 0, cond",
        "sigma 1 to 0.5, uncond",
        "sigma 0.5 to 0, uncond",
    ]


def test_evidence_is_the_worst_of_the_stages_or_none():
    after = merged(_component([A, A, A])).layers["one"][0]
    assert after[0].error == pytest.approx(0.2) and after[1].error is None
    before = _component([A, A])
    spare = [HeadChoice(A, 0.1, B, 0.3), HeadChoice(A, 0.2, B, 0.2)]
    rows = tuple((head, head) for head in spare)
    head = merged(replace(before, layers={"one": rows})).layers["one"][0][0]
    assert head == HeadChoice(A, 0.2, B, 0.3)
    other = HeadChoice(A, 0.2, Pattern(Skip()), 0.2)
    rows = ((spare[0],) * 2, (other,) * 2)
    head = merged(replace(before, layers={"one": rows})).layers["one"][0][0]
    assert head == HeadChoice(A, 0.2)


def test_a_plans_shares_are_added_up_and_it_still_saves(tmp_path):
    plan = replace(
        made_up_plan(),
        components={"transformer": _component([A, A, B])},
        provenance={"stage_shares": {"transformer": [0.2, 0.3, 0.5]}, "seed": 1},
    )
    after = merged_plan(plan)
    assert after.provenance == {"stage_shares": {"transformer": [0.5, 0.5]}, "seed": 1}
    after.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == after
    assert merged_plan(made_up_plan()) == made_up_plan()
