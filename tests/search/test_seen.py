"""Many candidates at once are what each is alone; heads in parallel are what they are in turn."""

import pytest
import torch

from sparse_dit.index import build_index, seen_cells
from sparse_dit.layout import TokenLayout, tile_order
from sparse_dit.patterns import Stencil
from sparse_dit.search.candidates import _reach, all_candidates, tilings
from sparse_dit.search.cells import cell_table
from sparse_dit.search.nested import kind_of
from sparse_dit.search.ranking import nested_stencil
from sparse_dit.search.sampling import parallel_map
from sparse_dit.search.seen import densities, grouped
from sparse_dit.search.statistics import empty_statistics, of_head

VIDEOS = [
    TokenLayout.video(5, 7, 9, text_before=6),
    TokenLayout.video(1, 12, 20, text_after=3),
    TokenLayout.video(70, 3, 4),
    TokenLayout.video(4, 16, 16, text_before=3),  # whole tiles
]


def _candidates(layout):
    generator = torch.Generator().manual_seed(0)
    every = empty_statistics(layout, tilings(layout), 1)
    statistics = {tile: of_head(part, 0) for tile, part in every.items()}
    for part in statistics.values():
        for values in part.values():
            values += torch.rand(values.shape, generator=generator)
    return all_candidates(statistics, layout)


@pytest.mark.parametrize("layout", VIDEOS, ids=str)
def test_candidates_judged_together_see_what_each_sees(layout):
    candidates = _candidates(layout)
    assert [kind_of(pattern) for pattern in candidates] == list(candidates.kinds)
    told = {0}  # the dense one
    share = densities(candidates, layout)
    for places, group in grouped(candidates, layout):
        cell = torch.arange(len(cell_table(layout, group.cells[0]).tokens))
        seen = group.rows(cell, layout)
        for place, mine in zip(places.tolist(), seen, strict=True):
            pattern = candidates[place]
            assert mine.equal(seen_cells(pattern, tile_order(layout, pattern.tile))), pattern
            told.add(place)
    assert told == set(range(len(candidates)))
    for place in range(0, len(candidates), 7):
        index = build_index([candidates[place]], layout)
        assert share[place] == pytest.approx(index.density, rel=1e-9), candidates[place]


@pytest.mark.parametrize("layout", VIDEOS, ids=str)
def test_nested_stencils_are_those_of_their_offsets(layout):
    table = cell_table(layout, (1, 2, 3))
    reach = table.counts - 1
    lattice = torch.cartesian_prod(*(torch.arange(-n, n + 1) for n in reach.tolist()))
    ranked = lattice[torch.randperm(len(lattice), generator=torch.Generator().manual_seed(0))]
    counts = sorted({1, 2, len(ranked) // 3, len(ranked)} - {0})
    place = torch.empty((2 * reach + 1).tolist(), dtype=torch.int64)
    place[tuple((ranked + reach).T)] = torch.arange(len(ranked))
    for number, count in enumerate(counts):
        stencil = nested_stencil(place, counts, number, reach)
        assert stencil == Stencil.from_offsets(ranked[:count], _reach(table))


@pytest.mark.parametrize("threads", [1, 3])
def test_each_call_is_made_once_and_computes_on_one_thread(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = []
        with torch.inference_mode():
            parallel_map(
                lambda head: seen.append(
                    (head, torch.get_num_threads(), torch.is_inference_mode_enabled())
                ),
                7,
            )
        assert sorted(seen) == [(head, 1, True) for head in range(7)]
        assert torch.get_num_threads() == threads
        with pytest.raises(ZeroDivisionError):
            parallel_map(lambda head: 1 / (2 - head), 5)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
