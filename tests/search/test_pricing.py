"""What attention costs inside a generation: by token order, and at the speed of the dense generations."""

import pytest
import torch

from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations import workload
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Stencil
from sparse_dit.search.candidates import tilings
from sparse_dit.search.cost import CostTable, measure_cost
from sparse_dit.search.pricing import inside
from sparse_dit.search.profile import ComponentProfile
from sparse_dit.search.verify import Reference, dense_reference
from sparse_dit.timing import Stopwatch, Taken
from tests.helpers import tiny_pipelines

LAYOUT = TokenLayout.video(2, 8, 8)
POINTS = {False: ((0.1, 1e-3), (1.0, 1e-2)), True: ((0.1, 2e-3), (1.0, 2e-2))}
TABLE = CostTable(LAYOUT, 8e-3, POINTS, "cpu", 1, "cpu", "float32", 6e-3, orders={(1, 8, 8): 1.5})
LOCAL = Stencil(((0, 0, 0, 1),))
HEADS = dict.fromkeys(["a", "b", "c"], (2, 16))


def test_a_head_costs_what_its_token_order_does():
    assert TABLE.seconds(Pattern(LOCAL, (4, 4, 4)), 0.1) == pytest.approx(1e-3)
    assert TABLE.seconds(Pattern(LOCAL, (1, 8, 8)), 0.1) == pytest.approx(1.5e-3)
    assert TABLE.seconds(Pattern(LOCAL, (1, 8, 8), far=True), 0.1) == pytest.approx(3e-3)
    assert TABLE.seconds(Pattern(Dense()), 1.0) == 6e-3 and TABLE.stock_seconds == 8e-3


def test_all_costs_are_at_the_speed_that_dense_attention_had():
    parts = {
        name: ComponentProfile("Some", "hash", HEADS, layout=LAYOUT, layers=list(HEADS))
        for name in ("transformer", "transformer_2")
    }
    calls = {"transformer": [4, 6], "transformer_2": [10]}  # 2 x 10 x 3 x 2 head calls of 8 ms
    attention = {"transformer": 0.5, "transformer_2": 0.94}  # 1.44 instead of .96 s
    video, taken = torch.zeros(1).numpy(), Taken(9.0, 9.0)
    references = [Reference(Case("a cat"), video, taken, {}, attention)] * 2
    tables = inside({name: {(2, 16): TABLE} for name in parts}, parts, calls, references)
    for table in (costs[2, 16] for costs in tables.values()):
        assert table.in_generation == pytest.approx(1.5)
        assert table.stock_seconds == pytest.approx(12e-3)
        assert table.seconds(Pattern(Dense()), 1.0) == pytest.approx(9e-3)
        assert table.seconds(Pattern(LOCAL, (1, 8, 8)), 0.1) == pytest.approx(2.25e-3)
        assert table.to_dict()["in_generation"] == pytest.approx(1.5)
        assert table.to_dict()["orders"] == {"1x8x8": 1.5}


def test_token_orders_are_measured_beside_the_first():
    orders = tilings(LAYOUT)[1:]
    table = measure_cost(LAYOUT, 2, 16, budgets=(0.1, 0.5), orders=orders)
    assert set(table.orders) == set(orders) and all(0 < t < 50 for t in table.orders.values())


def test_a_reference_says_what_its_attention_took():
    pipe, _ = tiny_pipelines.wan()
    settings = GenerationSettings(64, 64, 17, steps=2, guidance=3.0, max_sequence_length=16)
    reference = dense_reference(workload(pipe, settings), Case("a cat plays the piano"))
    assert 0 < reference.attention["transformer"] < reference.seconds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stopwatch_counts_what_the_gpu_takes():
    watch, x = Stopwatch(), torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        watch.run(lambda: x @ x, x.device)
    assert 1e-4 < watch.seconds < 1.0 and watch.seconds == watch.seconds
