"""Settings of a whole process change nothing: a factory that forgets its device or dtype is found here."""

import functools

import pytest
import torch

from sparse_dit.attention import attend, block_mass
from sparse_dit.autocast import in_own_dtypes
from sparse_dit.backends import gather, selfcheck
from sparse_dit.backends.chunks import chunks_of
from sparse_dit.backends.cpu import library
from sparse_dit.backends.cpu.packed import pack_index
from sparse_dit.backends.flex_lists import lists_of
from sparse_dit.backends.packages.blocks import block_lists, block_map
from sparse_dit.backends.packages.flashinfer import sizes
from sparse_dit.backends.reference import token_mask
from sparse_dit.backends.sorting import orders_of, pool_far_field
from sparse_dit.backends.triton.config import configs_for
from sparse_dit.backends.triton.tables import tables_of
from sparse_dit.backends.triton.work import work_of
from sparse_dit.curve import Curve, curve_path
from sparse_dit.cut import cut
from sparse_dit.generation import GenerationSettings
from sparse_dit.index import build_index
from sparse_dit.integrations.parallel import shards
from sparse_dit.intervals import causal_rows, valid_rows
from sparse_dit.layout import TokenLayout, tile_order
from sparse_dit.nan_guard import finite_or_dense
from sparse_dit.on_cpu import on_cpu
from sparse_dit.patterns import Pattern, Window
from sparse_dit.reuse import without
from sparse_dit.rounding import from_blocks, to_blocks
from sparse_dit.search import search
from sparse_dit.search.candidates import fixed
from sparse_dit.search.cells import cell_table, sample_rows, sampled_rows
from sparse_dit.search.local import improve
from sparse_dit.search.nested import Candidates
from sparse_dit.search.solve import evaluate
from sparse_dit.search.statistics import discover, empty_statistics, score_all
from tests.helpers import tiny_pipelines
from tests.helpers.cases import PATTERN_CASES
from tests.helpers.kernel_cases import in_order, qkv
from tests.helpers.search_cases import stub_costs
from tests.helpers.settings_cases import SETTINGS, clear_caches, default_device, differences, flat
from tests.helpers.solver_cases import random_problem

LAYOUT = TokenLayout.video(3, 5, 7, text_before=3, text_after=4)
PADDED = valid_rows(torch.tensor([LAYOUT.seq_len, LAYOUT.seq_len - 9]), LAYOUT.seq_len)
CASES = [*PATTERN_CASES[1::9], Pattern(Window(columns=3), Curve("frame", 8), far=True)]
WINDOW = Pattern(Window(0, 1, 1), (2, 2, 2), far=True)
HERE = ("cpu", "gather", "reference") if library.LIBRARY else ("gather", "reference")
INPUTS = qkv(build_index([WINDOW] * 2, LAYOUT), 16, batch=2, dtype=torch.bfloat16)
TASK = random_problem()


def lists():
    """Layouts, indices and what each backend makes of them."""
    index = build_index(CASES, LAYOUT, group=32)
    queries = torch.arange(LAYOUT.seq_len, device="cpu")
    found = [index.entries, index.head_density, index.density, curve_path((3, 4, 5))]
    found += [tile_order(LAYOUT, (2, None, 3)).boxes(3), shards(LAYOUT, 3), sizes(300, 2)]
    for entry in index.entries:
        blocks = to_blocks(entry, 64, 64)
        found += [blocks, from_blocks(blocks, entry.num_queries, entry.num_keys)]
        found += [cut(entry, queries[5:60], queries[::2]), list(chunks_of(entry, True))]
        found += [
            token_mask(entry),
            tables_of(entry, 64, 32, rows=causal_rows(*[LAYOUT.seq_len] * 2, 3)),
        ]
    found += [orders_of(index), lists_of(index, 64), pack_index(index)]
    found += [block_map(index, 128, 128), block_lists(index, 128, 128)]
    found += [work_of(index, 1, *configs_for("sm80", 64)).order, without(index, (0,)).entries]
    return flat(found)


def results():
    """What backends compute, with padding and order too, and whether their check holds."""
    found = []
    for causal in (False, True):
        index = build_index([WINDOW, CASES[1]], LAYOUT)
        index = in_order(index) if causal else index
        q, k, v = INPUTS
        found += flat(pool_far_field(k, v, index, PADDED.valid(LAYOUT.seq_len, LAYOUT.seq_len)))
        for name in HERE:
            got = attend(
                q, k, v, index, row_stop=PADDED.stop, backend=name, return_lse=True, mass_block=16
            )
            found += [*got, attend(q, k, v, index, backend=name).out]
            found.append(block_mass(q, k, index, got.lse, mass_block=16, backend=name))
        found.append(finite_or_dense(got.out * torch.inf, q, k, v, PADDED, None))
    return [*found, *flat(selfcheck.examine(gather, "cpu", 16, torch.bfloat16))]


@on_cpu
@in_own_dtypes
def sums():
    """What a search adds up, and the solvers."""
    tile, generator = (2, 2, 2), torch.Generator("cpu").manual_seed(0)
    q, k, v = (x[0, 0] for x in INPUTS)
    rows = sample_rows(LAYOUT, 20, generator)
    sampled = sampled_rows(q[None], k[None], v[None], rows, 0.3, LAYOUT.seq_len)
    statistics, cells = (
        empty_statistics(LAYOUT, [tile], 1),
        sampled.by_cells(cell_table(LAYOUT, tile)),
    )
    discover(statistics[tile], range(1), cells, LAYOUT, tile)
    listed = [pattern for pattern in fixed(LAYOUT) if pattern.tile == tile]
    found = [statistics, score_all(sampled, Candidates([WINDOW, *listed]), LAYOUT)]
    found.append(improve(TASK, evaluate(TASK, torch.zeros(8, dtype=torch.int64)), loss=0.05))
    return flat(found)


@functools.cache
def wanted(make):
    """Made without any setting; what is cached then is used under the first one."""
    clear_caches()
    return make()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("make", [lists, results, sums])
def test_settings_change_nothing(make, name):
    """Made under the setting, then used without it, and the other way round."""
    want = wanted(make)
    with SETTINGS[name]():
        assert not differences(make(), want)
        clear_caches()
        assert not differences(make(), want)
    assert not differences(make(), want)


def test_a_search_under_another_default_device(monkeypatch):
    """The plan is that of any other process."""
    stub_costs(monkeypatch)
    pipe, _ = tiny_pipelines.wan()
    settings = GenerationSettings(32, 32, 9, steps=4, guidance=3.0, max_sequence_length=16)

    def searched():
        clear_caches()
        asked = {"settings": settings, "max_error": 0.5, "profile_steps": 2}
        plan = search(pipe, ["a cat"], held_out=["a dog"], **asked)
        return plan.components["transformer"].layers

    want = searched()
    with default_device("meta"):
        assert searched() == want
