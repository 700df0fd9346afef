"""Compiled FlexAttention on the CPU. Every new shape compiles for seconds: few shapes, many indices."""

import pytest
import torch

from sparse_dit.attention import BACKENDS, attend, backend_name
from sparse_dit.backends import flex, flex_lists, selfcheck
from sparse_dit.backends.reference import token_mask
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Stripe, Union, Vertical, Window
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.contract_cases import check_empty, check_nan, check_padding, index_of
from tests.helpers.contract_cases import inputs as inputs_of
from tests.helpers.inductor import needs_inductor
from tests.helpers.interval_cases import bounds, every_entry, masks
from tests.helpers.kernel_cases import in_order, qkv, until

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # inductor's own, on first compilation
    needs_inductor,
]
LAYOUT = TokenLayout.video(3, 5, 7, text_before=2, text_after=23)  # 130 tokens, 3 blocks
FAR = Pattern(Window(0, 1, 1), (2, 2, 2), far=True)
STRIPE = Pattern(Stripe(time_width=1), (1, None, None), cell=1)
PATTERNS = [
    [FAR, Pattern(Dense()), STRIPE, Pattern(Skip())],
    [Pattern(Skip()), Pattern(Union((Window(0), Vertical((1, 3, 3), (4,))))), STRIPE, FAR],
]  # of one shape


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, LAYOUT.seq_len, 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def assert_right(q, k, v, index, stop=None, tolerance=1e-5):
    out = attend(q, k, v, index, row_stop=stop, backend="flex").out
    wide = [x.double() for x in (q, k, v)]
    truth = attend(*wide, index, row_stop=stop, backend="reference").out
    torch.testing.assert_close(out.double(), truth, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_patterns_far_field_padding_and_shared_keys(causal):
    """Order, pooled keys, padding, columns, dense and skipped heads in one launch."""
    q, k, v = inputs()
    for patterns in PATTERNS:
        index = build_index(patterns, LAYOUT)
        index = in_order(index) if causal else index
        for stop in (None, until(index, LAYOUT.seq_len - 9, 0)):
            assert_right(q, k, v, index, stop)


def test_whole_blocks_in_place():
    """No score_mod, keys shared as they are; full and partial blocks, one row of blocks empty."""
    index = selfcheck.block_case()
    lists = flex_lists.lists_of(index, flex.BLOCK["cpu"])
    assert lists.full_counts.sum() and lists.partial is not lists.full
    found = selfcheck.examine(_without_second_case(), "cpu", 16, torch.float32)
    assert found.problem is None and found.error < 1e-5


def _without_second_case():
    """The backend, for the case in blocks alone: the other would compile once more."""
    module = type(flex)("flex_blocks")
    vars(module).update(forward=flex.forward, lacks=flex.lacks)
    module.unsupported = lambda q, index: None if index.num_queries == 700 else "not now"
    return module


def test_other_lists_of_a_shape_compile_nothing():
    q, k, v = inputs()
    indices = [build_index(patterns, LAYOUT) for patterns in PATTERNS]
    for index in indices:
        attend(q, k, v, index, backend="flex")
    with torch.compiler.set_stance("fail_on_recompile"):
        for patterns in PATTERNS:
            assert_right(q, k, v, build_index(patterns, LAYOUT))


def test_uncompiled_it_refuses():
    """Then it would ignore the lists."""
    q, k, v = inputs()
    index = build_index(PATTERNS[0], LAYOUT)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(NotImplementedError, match="ignores the lists"),
    ):
        attend(q, k, v, index, backend="flex")


def test_every_shape_has_its_own_limit_of_graphs():
    runs = [flex._compiled(("made up", number)) for number in range(3)]
    codes = {id(run._torchdynamo_orig_callable.__code__) for run in runs}
    assert len(codes) == 3


@pytest.mark.parametrize("wants", [{"return_lse": True}, {"mass_block": 16}])
def test_what_it_cannot_give_is_said(wants):
    q, k, v = inputs()
    index = build_index(PATTERNS[0], LAYOUT)
    with pytest.raises(NotImplementedError, match=r"'flex' cannot run this: .*FlexAttention"):
        attend(q, k, v, index, backend="flex", **wants)


def test_reasons():
    index = build_index(PATTERNS[0], LAYOUT)
    q = inputs()[0]
    assert "float64" in flex.unsupported(q.double(), index)
    assert "meta" in flex.unsupported(q.to("meta"), index)
    assert flex.unsupported(q, index) is None
    assert backend_name(q, index) in ("cpu", "gather")  # on a CPU only by name
    assert BACKENDS["flex"] is flex


def test_what_every_backend_keeps():
    """But for NaN in a value, which shows in all rows of its blocks, and in a key, which may not show."""
    check_padding("flex")
    check_nan("flex", odd=("keys",), shows=False)
    check_empty("flex")


def test_bfloat16_and_autocast():
    """One dtype: each compiles. In it the numbers are right."""
    index = index_of()
    q, k, v = inputs_of(torch.float32)
    low = [x.bfloat16() for x in (q, k, v)]
    assert_right(*low, index, tolerance=2e-2)
    want = attend(*low, index, backend="flex").out
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(q, k, v.bfloat16(), index, backend="flex").out, want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_lists_cover_exactly(layout):
    """Expanded to token masks they are what the reference computes; nothing is compiled."""
    for pattern in PATTERN_CASES:
        index = SparseIndex(build_index([pattern], layout).entries, (0,))
        lists = flex_lists.lists_of(index, 32)
        entry = index.entries[0]
        exact, pooled = token_mask(entry)
        wanted = exact if pooled is None else torch.cat([exact, pooled], 1)
        keys = torch.cat([entry.key_tokens, torch.arange(exact.shape[1], wanted.shape[1])])
        sorted_mask = wanted[entry.query_tokens][:, keys]
        assert torch.equal(expanded(lists, *sorted_mask.shape), sorted_mask)


def expanded(lists, n, m):
    block = lists.block
    _, rows, columns = lists.number.shape
    mask = torch.zeros(rows, columns, block, block, dtype=torch.bool)
    for row, column, bits in walk(lists):
        mask[row, column] = True if bits is None else unpacked(bits, block)
    return mask.permute(0, 2, 1, 3).reshape(rows * block, columns * block)[:n, :m]


def walk(lists):
    for row in range(lists.full.shape[2]):
        for column in lists.full[0, 0, row, : lists.full_counts[0, 0, row]].tolist():
            yield row, column, None
        for column in lists.partial[0, 0, row, : lists.partial_counts[0, 0, row]].tolist():
            yield row, column, lists.bits[lists.number[0, row, column]]


def unpacked(bits, block):
    return (bits[..., None] >> torch.arange(32) & 1).flatten(1)[:, :block].bool()


@pytest.mark.parametrize("kind", ["left padding", "packed", "window", "rows without keys"])
def test_row_intervals(kind):
    """Keys in no row's interval hold NaN; one graph for all kinds."""
    index, mask = every_entry(), masks()[kind]
    q, k, v = qkv(index, 16, batch=2, kv_heads=3)
    hidden = ~mask.any(1)[:, None, :, None]
    rows = bounds(mask)
    bad = [x.masked_fill(hidden, torch.nan) for x in (k, v)]
    out = attend(q, *bad, index, **rows, backend="flex").out
    truth = attend(*(x.double() for x in (q, k, v)), index, **rows, backend="reference").out
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
