"""What attention costs inside a generation: by token order, and at the speed of the dense generations."""

import pytest
import torch

from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations import workload
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Stencil
from sparse_dit.search.candidates import tilings
from sparse_dit.search.cost import CostTable, measure_cost, smoothed
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


def timed_table(noise, order=1.02):
    """Costs of a fixed part and one by density, each timing off by at most `noise`, relative."""
    generator = torch.Generator().manual_seed(round(1e4 * noise))

    def off(seconds):
        return seconds * (1 + noise * (2 * torch.rand(1, generator=generator).item() - 1))

    points = {
        far: tuple((d, off(1e-4 + 8e-3 * d)) for d in (0.02, 0.07, 0.15, 0.3, 0.5, 0.75))
        for far in (False, True)
    }
    orders = {(1, 8, 8): order}
    return CostTable(LAYOUT, 1e-2, points, "cpu", 1, "cpu", "float32", off(8.1e-3), orders=orders)


def test_one_line_takes_what_single_timings_are_off_by():
    table = smoothed(timed_table(0.05))
    assert 0.01 < table.spread < 0.05 and table.to_dict()["spread"] == round(table.spread, 4)
    patterns = [
        Pattern(LOCAL, tile, far=far) for tile in ((4, 4, 4), (1, 8, 8)) for far in (False, True)
    ]
    for density in (0.0, 0.01, 0.2, 0.6, 0.9, 1.0):
        (seconds,) = {table.seconds(pattern, density) for pattern in patterns}
        assert seconds == pytest.approx(1e-4 + 8e-3 * density, rel=0.03, abs=1e-5)
    assert table.seconds(Pattern(Dense()), 1.0) == table.seconds(patterns[0], 1.0)


def test_costs_that_are_no_line_stay_as_timed():
    steps = ((0.1, 1e-3), (0.5, 1e-3), (0.9, 8e-3))
    table = CostTable(LAYOUT, 1e-2, dict.fromkeys((False, True), steps), "cpu", 1, "cpu", "float32")
    assert smoothed(table) == table and table.spread is None


def test_token_orders_that_cost_clearly_more_stay_dearer():
    for order, priced in ((1.22, 1.2), (1.07, 1.0), (0.93, 1.0), (0.87, 0.9)):
        assert smoothed(timed_table(0.01, order)).orders == {(1, 8, 8): priced}


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
