"""The native CPU kernel against the float64 reference on indices and shapes that chance makes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_dit.attention import attend, block_mass
from sparse_dit.backends.cpu import library
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.intervals import causal_rows
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Stripe, Union, Vertical, Window
from tests.helpers.kernel_cases import DTYPES, assert_close, entry, in_order, qkv, relative, split

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))

repeatable = settings(
    derandomize=True,  # the same examples everywhere: a failure is a failure of this commit
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
lengths = st.integers(1, 5) | st.integers(1, 150) | st.sampled_from([16, 63, 64, 65, 128, 129])
seeds = st.integers(0, 2**20)
variants = st.sampled_from(library.LIBRARY.runnable if library.LIBRARY else [""])


@st.composite
def key_lists(draw, m, allowed):
    """Keys that a group sees, among the allowed."""
    kind = draw(st.sampled_from(["none", "all", "block", "columns", "scattered", "last"]))
    if kind == "none":
        return allowed[:0]
    if kind == "all":
        return allowed
    if kind == "block":
        start = draw(st.integers(0, m - 1))
        stop = draw(st.integers(start + 1, m))
        return allowed[(allowed >= start) & (allowed < stop)]
    if kind == "columns":
        return allowed[draw(st.integers(0, 3)) :: draw(st.integers(1, 9))]
    if kind == "last":
        return allowed[-draw(st.integers(1, 3)) :]
    generator = torch.Generator().manual_seed(draw(seeds))
    share = draw(st.floats(0.02, 0.98))
    return allowed[torch.rand(len(allowed), generator=generator) < share]


@st.composite
def entries(draw, n, m):
    """Groups of any sizes, orders, runs and cells."""
    if draw(st.booleans()):
        groups = split(n, draw(st.sampled_from([1, 7, 16, 32, 64, 100, 128, n])))
    else:
        cuts = draw(st.sets(st.integers(1, n), max_size=6)) | {n}
        groups = torch.tensor([0, *sorted(cuts)]).diff().tolist()
    generator = torch.Generator().manual_seed(draw(seeds))
    orders = [
        torch.randperm(x, generator=generator) if draw(st.booleans()) else None for x in (n, m)
    ]
    cells, pooled, lists = None, None, []
    if draw(st.booleans()):
        bounds = draw(st.lists(st.integers(0, m), min_size=2, max_size=20))
        cells = torch.tensor(sorted(bounds))
        pooled = [
            (torch.rand(len(cells) - 1, generator=generator) < 0.6).nonzero()[:, 0] for _ in groups
        ]
    for group in range(len(groups)):
        free = torch.ones(m, dtype=torch.bool)
        if cells is not None and pooled is not None:
            for cell in pooled[group].tolist():
                free[cells[cell] : cells[cell + 1]] = False
        lists.append(draw(key_lists(m, free.nonzero()[:, 0])))
    return entry(m, groups, lists, q_order=orders[0], k_order=orders[1], cells=cells, pooled=pooled)


@st.composite
def indices(draw):
    n, m = draw(lengths), draw(lengths)
    parts = draw(st.lists(entries(n, m), min_size=1, max_size=3))
    every = list(range(len(parts)))
    more = draw(st.lists(st.sampled_from(every), max_size=3))
    heads = draw(st.permutations(every + more))
    rows = causal_rows(n, m, draw(st.integers(-n - 2, m + 2))) if draw(st.booleans()) else None
    return SparseIndex(tuple(parts), tuple(heads), rows)


@st.composite
def bounds_of_rows(draw, batch, n, m):
    """One bound of each row: the same, rising as in causal order or in packed sequences, or any."""
    kind, generator = draw(st.sampled_from(["same", "rising", "any"])), torch.Generator()
    generator.manual_seed(draw(seeds))
    if kind == "any":
        return torch.randint(-1, m + 2, (batch, n), generator=generator).int()
    first = torch.randint(-n, m + 1, (batch, 1), generator=generator).int()
    step = draw(st.sampled_from([1, 7, 50])) if kind == "rising" else n
    return first + (torch.arange(n) // step * step).int()


def compare(data, index, variant):
    """One call on random inputs, with all results, and the mass from its LSE."""
    heads = index.num_heads
    batch = data.draw(st.integers(1, 2), "batch")
    kv_heads = data.draw(st.sampled_from([h for h in range(1, heads + 1) if heads % h == 0]))
    dim = data.draw(st.sampled_from([8, 16, 24, 40, 64, 80, 96, 128, 200, 256]), "dim")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    size = data.draw(st.sampled_from([0.1, 1.5, 1.5, 12.0]), "size of the numbers")
    rows = {}
    for name in ("row_start", "row_stop"):
        if data.draw(st.booleans(), name):
            rows[name] = data.draw(bounds_of_rows(batch, index.num_queries, index.num_keys), name)
    seed = data.draw(seeds, "seed")
    inputs = qkv(index, dim, batch=batch, kv_heads=kv_heads, dtype=dtype, seed=seed, size=size)
    if data.draw(st.booleans(), "by token"):
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    keywords = {**rows, "mass_block": data.draw(st.sampled_from([1, 16, 50, 64, 1000]))}
    before = library.LIBRARY.variant
    library.LIBRARY.use_variant(variant)
    try:
        ours = attend(*inputs, index, backend="cpu", return_lse=True, **keywords)
        mass = block_mass(*inputs[:2], index, ours.lse, backend="cpu", **keywords)
    finally:
        library.LIBRARY.variant = before
    rounds = "bf16" in variant and dtype == torch.bfloat16
    assert_close(ours, inputs, index, rounds_weights=rounds, **keywords)
    share = relative(*inputs[:2], index=index, lse=ours.lse).amax()
    bound = 2 * share * ours.mass.double() + 1e-30
    assert ((mass.double() - ours.mass.double()).abs() <= bound).all()


@given(st.data(), indices(), variants)
@settings(repeatable, max_examples=600)
def test_any_index(data, index, variant):
    compare(data, index, variant)


axis = st.none() | st.integers(1, 5)
shapes = st.one_of(
    st.just(Dense()),
    st.just(Skip()),
    st.builds(Window, *[st.none() | st.integers(0, 3)] * 3),
    st.builds(Stripe, time_width=st.none() | st.integers(1, 3)),
    st.just(Stripe(space_width=(0, 2))),
    st.just(Vertical((1, 2, 2), (0, 3))),
    st.just(Union((Window(0, 1, 1), Vertical((1, 3, 3), (4,))))),
)
patterns = st.builds(
    Pattern,
    shapes,
    st.tuples(axis, axis, axis),
    cell=st.none() | st.integers(1, 9),
    far=st.booleans(),
    sink_frames=st.integers(0, 2),
)
videos = st.builds(Segment.grid, st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
texts = st.builds(Segment.global_, st.integers(1, 70))
layouts = st.builds(
    lambda parts: TokenLayout(tuple(parts)), st.lists(videos | texts, min_size=1, max_size=3)
)


@given(
    st.data(), st.lists(patterns, min_size=1, max_size=4), layouts, st.integers(1, 128), variants
)
@settings(repeatable, max_examples=300)
def test_any_pattern(data, heads, layout, group, variant):
    index = build_index(heads, layout, group=group)
    compare(data, in_order(index) if data.draw(st.booleans(), "causal") else index, variant)
