"""What tests of whole searches share: costs that aren't measured, and a plan that is used."""

import numpy as np

import sparse_dit
from sparse_dit.integrations import workload
from sparse_dit.plan import Plan
from sparse_dit.search import engine, pricing
from sparse_dit.search.cells import sampled_rows
from sparse_dit.search.cost import CostTable


def stub_costs(monkeypatch):
    """Sparse attention at a price in proportion to density, on any machine, at any size."""

    def measured(layout, num_heads, head_dim, *, device, dtype, backend, orders):
        points = ((0.01, 1e-5), (1.0, 1e-3))
        return CostTable(layout, 1e-3, {False: points, True: points}, backend, 1, "cpu", "float32")

    monkeypatch.setattr(pricing, "measure_cost", measured)
    monkeypatch.setattr(engine, "inside", lambda tables, *measured: tables)
    monkeypatch.setattr(engine, "break_even_tokens", lambda *args: 0)


def accounts(pipe, plan, case, settings, folder):
    """What ran, by component, with the plan saved, loaded and patched; the output must be finite."""
    plan.save(folder / "plan.json")
    loaded = Plan.load(folder / "plan.json")
    assert loaded.to_dict() == plan.to_dict()
    dense, _ = workload(pipe, settings).run(case)
    with sparse_dit.patch(pipe, loaded) as handle:
        video, _ = workload(pipe, settings).run(case)
        ran = handle.ran
    assert np.isfinite(video).all() and video.shape == dense.shape
    return ran


def cell_sums(q, k, v, rows, table, scale, valid):
    """The sampled rows of one head, evaluated exactly and summed by the cells of `table`."""
    return sampled_rows(q, k, v, rows, scale, valid).by_cells(table)
