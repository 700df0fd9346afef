"""Kernels of other packages: their signatures, what is refused, and the lists that they are given.

None of them runs here. Each is emulated: a function with the signature that was read in its source, which
computes what that documents for its lists, so that a wrong conversion gives wrong numbers.
"""

import ast
import functools
import importlib.metadata
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sparse_dit.attention import AUTO, BACKENDS, attend
from sparse_dit.backends import packages, selfcheck
from sparse_dit.backends.packages import flashinfer_routes, whole
from sparse_dit.curve import Curve
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, SlidingTile, Stripe, Window
from tests.helpers import emulated_packages
from tests.helpers.emulated_packages import FAKES, GIVEN
from tests.helpers.kernel_cases import in_order, until
from tests.helpers.signatures import parameters

NAMES = ("cudnn", "flash_attn_4", "flashinfer", "sparge", "block_sparse_attn")
CONTRACTS = [contract for name in NAMES for contract in BACKENDS[name].CONTRACTS]
WHOLE = TokenLayout.video(4, 16, 16)  # tiles of 4 x 16 x 4 = 256 tokens
TILES = (4, 16, 4)
CASES = [(name, capability) for name in NAMES for capability in FAKES[name][1]]
MIXED = [
    Pattern(SlidingTile(1, 1, 3), TILES),
    Pattern(Dense()),
    Pattern(Window(0), (1, None, None)),
]


@pytest.fixture
def emulated(monkeypatch):
    """Puts an emulation in a package's place, on a GPU of some capability that is really the CPU."""

    def put(name, capability):
        for module in FAKES[name][0]():
            for depth in range(module.count(".") + 1):
                part = ".".join(module.split(".")[: depth + 1])
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        for module, contents in FAKES[name][0]().items():
            vars(sys.modules[module]).update(contents)
        monkeypatch.setattr(whole, "not_here", lambda q, package, head_dims: None)
        monkeypatch.setattr(whole, "capability", lambda device: capability)
        flashinfer_routes.planned.cache_clear()
        return BACKENDS[name]

    return put


def inputs(layout, heads=3, key_heads=None, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, count, layout.seq_len, 128) for count in (heads, *[key_heads or heads] * 2)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@functools.cache
def truth(patterns, layout, key_heads=None, batch=2):
    """What the reference computes of `inputs` for patterns, one a head; the same for every package."""
    wide = [x.double() for x in inputs(layout, len(patterns), key_heads, batch)]
    return attend(*wide, build_index(patterns, layout), backend="reference", return_lse=True)


def test_all_have_an_emulation():
    assert set(FAKES) == set(NAMES) and not set(NAMES) & set(AUTO)
    assert {
        name for name in BACKENDS if BACKENDS[name].__name__.startswith(packages.__name__)
    } == set(NAMES)


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_lists_are_what_the_package_documents(name, capability, emulated):
    """Sorted tiles, dense heads and frames, other lists in each head, a batch."""
    emulated(name, capability)
    index = build_index(MIXED, WHOLE)
    q, k, v = inputs(WHOLE)
    assert BACKENDS[name].unsupported(q, index) is None
    want = truth(tuple(MIXED), WHOLE)
    wants_lse = BACKENDS[name].lacks(q, True, False) is None
    got = attend(q, k, v, index, backend=name, return_lse=wants_lse)
    torch.testing.assert_close(got.out.double(), want.out, atol=1e-5, rtol=1e-5)
    if wants_lse:
        torch.testing.assert_close(got.lse, want.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_the_check_before_first_use_runs_them(name, capability, emulated):
    """Ragged end, keys shared by heads, an empty row of blocks; and a dense one is caught."""
    module = emulated(name, capability)
    found = selfcheck.examine(module, "cpu", 128, torch.float16)
    assert found.problem is None and found.error < 1e-3


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_a_package_that_ignores_its_lists_is_caught(name, capability, emulated, monkeypatch):
    module = emulated(name, capability)

    def everything(q, k, v, seen, block_q, block_k, scale):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        return out, torch.zeros(q.shape[:3])

    monkeypatch.setattr(emulated_packages, "by_blocks", everything)
    found = selfcheck.examine(module, "cpu", 128, torch.float16)
    assert found.problem is not None and ("aren't 0" in found.problem or "error" in found.problem)


STILL = [Pattern(Window(n), (1, None, None)) for n in range(3)] + [Pattern(Dense())]


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_tokens_that_lie_in_order_are_not_copied(name, capability, emulated):
    """In a host's layout, `[B, N, H, D]`, with fewer heads of keys or as many."""
    emulated(name, capability)
    for key_heads in (4, 1):
        every = inputs(WHOLE, 4, key_heads)
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in every)
        patterns = tuple(STILL if key_heads == 4 else STILL[:1] * 4)
        GIVEN.clear()
        got = attend(q, k, v, build_index(patterns, WHOLE), backend=name).out
        assert GIVEN and set(GIVEN) == {x.untyped_storage().data_ptr() for x in (q, k, v)}
        want = truth(patterns, WHOLE, key_heads).out
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "capability"), CASES)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_heads_share_keys(name, capability, key_heads, emulated):
    """In one order or in two, with one pattern a key head and with more."""
    emulated(name, capability)
    tile, dense, frames = MIXED
    q, k, v = inputs(WHOLE, 4, key_heads, batch=1)
    for patterns in ((tile, tile, frames, frames), (tile, frames, dense, tile), (tile,) * 4):
        got = attend(q, k, v, build_index(patterns, WHOLE), backend=name).out
        want = truth(patterns, WHOLE, key_heads, batch=1).out
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_stretches_of_a_curve_are_blocks_in_any_grid(name, capability, emulated):
    """1,155 tokens, which no block divides; tables are made once."""
    emulated(name, capability)
    ragged = TokenLayout.video(5, 11, 21)
    patterns = (Pattern(Window(0, 0, 200), Curve("video", 256)), Pattern(Dense()), Pattern(Skip()))
    index = build_index(patterns, ragged)
    q, k, v = inputs(ragged)
    assert index.head_density[0] < 0.8
    got = attend(q, k, v, index, backend=name).out
    torch.testing.assert_close(got.double(), truth(patterns, ragged).out, atol=1e-5, rtol=1e-5)
    cached = {key: id(made) for key, made in index.cache.items()}
    attend(q, k, v, index, backend=name)
    assert cached == {key: id(made) for key, made in index.cache.items()}


FAR = [
    Pattern(Window(0, 0, 100), Curve("video", 128), far=True),
    Pattern(Window(0, 0, 300), Curve("video", 128), far=True),
    Pattern(Dense()),
    Pattern(Window(0, 0, 100), Curve("video", 128)),
    Pattern(Skip()),
]


@pytest.mark.parametrize(
    ("heads", "tokens", "pool"),
    [
        ([0, 1], 128, None),
        ([0, 2, 1], 64, None),
        ([0, 3, 4, 1], 128, 64),
        ([3, 2], 64, None),
        ([4, 4], 128, None),
    ],
    ids=str,
)
def test_flashinfer_pools_what_is_not_seen(heads, tokens, pool, emulated):
    """On Blackwell: heads with a far field, dense, plain and skipped ones; a ragged last block."""
    emulated("flashinfer", (10, 0))
    ragged = TokenLayout.video(5, 11, 21)
    patterns = [
        replace(FAR[h], tile=Curve("video", tokens), pool=pool if FAR[h].far else None)
        if h in (0, 1, 3) else FAR[h] for h in heads
    ]  # fmt: skip
    patterns = tuple(p for p in patterns for _ in range(2))
    index = build_index(patterns, ragged)
    for key_heads in (len(heads), 2 * len(heads)):
        q, k, v = inputs(ragged, len(patterns), key_heads)
        assert BACKENDS["flashinfer"].unsupported(q, index) is None
        got = attend(q, k, v, index, backend="flashinfer").out
        want = truth(patterns, ragged, key_heads).out
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_flashinfer_pools_nothing_else(emulated):
    """Pooled keys of 32 tokens have no block; before Blackwell, and at other head_dims, there are none."""
    module = emulated("flashinfer", (10, 0))
    ragged = TokenLayout.video(5, 11, 21)
    q = inputs(ragged)[0]
    small = build_index([replace(FAR[0], pool=32)] * 3, ragged)
    assert "pools blocks of 128 keys" in module.unsupported(q, small)
    fitting = build_index([FAR[0]] * 3, ragged)
    assert module.unsupported(q, fitting) is None
    assert "no far field" in module.unsupported(q[..., :64], fitting)
    with pytest.raises(NotImplementedError, match="no log-sum-exp"):
        attend(q, q, q, fitting, backend="flashinfer", return_lse=True)
    module = emulated("flashinfer", (9, 0))
    assert "no far field" in module.unsupported(q, fitting)


def test_flash_attn_4_has_small_blocks_on_hopper(emulated):
    patterns = (Pattern(Window(0, 0, 64), Curve("video", 64)),) * 3
    index = build_index(patterns, WHOLE)
    q, k, v = inputs(WHOLE)
    assert "seen in part" in emulated("flash_attn_4", (10, 0)).unsupported(q, index)
    assert emulated("flash_attn_4", (9, 0)).unsupported(q, index) is None
    got = attend(q, k, v, index, backend="flash_attn_4").out
    torch.testing.assert_close(got.double(), truth(patterns, WHOLE).out, atol=1e-5, rtol=1e-5)


REFUSED = [
    (build_index([Pattern(Window(0, 1, 1), (2, 2, 2))], WHOLE), "are seen in part"),
    (build_index([Pattern(SlidingTile(1, 1, 1), TILES, far=True, pool=32)], WHOLE), "no far field"),
    (in_order(build_index([Pattern(SlidingTile(1, 1, 1), TILES)], WHOLE)), "no row intervals"),
    (build_index([Pattern(Stripe(time_width=1), (1, None, None), cell=1)],
                 TokenLayout.video(3, 5, 7)), "are seen in part"),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("index", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_not_whole_blocks_is_refused(name, index, words, emulated):
    emulated(name, FAKES[name][1][0])
    index = SparseIndex(index.entries, (0, 0), index.rows)
    q = torch.zeros(1, 2, index.num_queries, 128)
    reason = BACKENDS[name].unsupported(q, index)
    assert reason is not None and (words in reason or "at least 128 tokens" in reason)


@pytest.mark.parametrize("name", NAMES)
def test_padding_mass_and_missing_lse_are_refused(name, emulated):
    emulated(name, FAKES[name][1][0])
    index, (q, k, v) = build_index(MIXED, WHOLE), inputs(WHOLE)
    with pytest.raises(NotImplementedError, match="no row intervals"):
        attend(q, k, v, index, backend=name, row_stop=until(index, 9, 9))
    with pytest.raises(NotImplementedError, match="no block mass"):
        attend(q, k, v, index, backend=name, mass_block=64)
    if BACKENDS[name].lacks(q, True, False):
        with pytest.raises(NotImplementedError, match="log-sum-exp"):
            attend(q, k, v, index, backend=name, return_lse=True)


OLD = [("cudnn", (8, 0), "sm_90 to sm_120"), ("flash_attn_4", (8, 9), "sm_90, sm_100 and sm_110 only"),
       ("flash_attn_4", (12, 0), "sm_90, sm_100 and sm_110 only"), ("flashinfer", (7, 5), "sm_80 or later"),
       ("sparge", (7, 5), "sm_80 or later"), ("block_sparse_attn", (7, 5), "sm_80 or later")]  # fmt: skip


@pytest.mark.parametrize(("name", "capability", "words"), OLD)
def test_architectures_that_would_go_wrong_are_refused(name, capability, words, emulated):
    emulated(name, capability)
    assert words in BACKENDS[name].unsupported(inputs(WHOLE)[0], build_index(MIXED, WHOLE))


def test_flashinfer_refuses_lists_that_would_fill_the_memory(emulated, monkeypatch):
    module = emulated("flashinfer", (8, 0))
    index = build_index(MIXED, WHOLE)
    monkeypatch.setattr(module, "MOST_LISTED", 1000)
    assert "GiB" in module.unsupported(inputs(WHOLE)[0], index)


@pytest.mark.parametrize("name", NAMES)
def test_here_the_reason_is_honest(name):
    index, q = build_index(MIXED, WHOLE), inputs(WHOLE)[0]
    reason = BACKENDS[name].unsupported(q, index)
    absent = whole.absent(BACKENDS[name].PACKAGE)
    assert reason == (absent or f"it runs on NVIDIA GPUs, but q is on {q.device}")
    with pytest.raises(NotImplementedError, match=f"backend '{name}' cannot run this"):
        attend(q, q, q, index, backend=name)


@pytest.mark.parametrize("contract", CONTRACTS, ids=[c.function for c in CONTRACTS])
def test_signature_is_that_of_the_installed_package(contract):
    """Read from its source, as importing it takes a GPU."""
    if reason := whole.absent(contract.package):
        pytest.skip(reason)
    file = importlib.metadata.distribution(contract.package).locate_file(contract.file)
    assert parameters(ast.parse(file.read_text()), contract.function) == contract.parameters
