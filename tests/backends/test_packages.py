"""Kernels of other packages: their signatures, what is refused, and the lists that they are given.

None of them runs here. Each is emulated: a function with the signature that was read in its source, which
computes what that documents for its lists, so that a wrong conversion gives wrong numbers.
"""

import ast
import importlib.metadata
import inspect
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from sparse_dit.attention import AUTO, BACKENDS, attend
from sparse_dit.backends import packages, selfcheck
from sparse_dit.backends.packages import whole
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, SlidingTile, Stripe, Window
from tests.helpers.kernel_cases import in_order, until
from tests.helpers.signatures import parameters

NAMES = ("cudnn", "flash_attn_4", "flashinfer", "sparge", "block_sparse_attn")
CONTRACTS = [contract for name in NAMES for contract in BACKENDS[name].CONTRACTS]
WHOLE = TokenLayout.video(4, 16, 16)  # tiles of 4 x 16 x 4 = 256 tokens
TILES = (4, 16, 4)
MIXED = [
    Pattern(SlidingTile(1, 1, 3), TILES),
    Pattern(Dense()),
    Pattern(Window(0), (1, None, None)),
]


def bound(contract, args, kwargs):
    """Arguments by name; TypeError if the package's function wouldn't take them."""
    names = contract.parameters
    kinds = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in names
    ]
    got = inspect.Signature(kinds).bind(*args, **kwargs)
    got.apply_defaults()
    return types.SimpleNamespace(**got.arguments)


def by_blocks(q, k, v, seen, block_q, block_k, scale):
    """What all of them document: attention over the blocks that are seen; nothing seen gives 0."""
    mask = seen.repeat_interleave(block_q, -2)[..., : q.shape[2], :]
    mask = mask.repeat_interleave(block_k, -1)[..., : k.shape[2]]
    logits = (q.double() @ k.double().mT * scale).masked_fill(~mask, -torch.inf)
    out = logits.softmax(-1).nan_to_num(0.0) @ v.double()
    return out.to(q.dtype), logits.logsumexp(-1).float()


def from_lists(counts, lists, columns):
    assert counts.dtype == lists.dtype == torch.int32
    place = torch.arange(lists.shape[-1]) < counts[..., None]
    seen = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool)
    seen.scatter_(-1, torch.where(place, lists.long(), columns), True)
    return seen[..., :columns]


def fake_cudnn():
    def forward(*args, **kwargs):
        a = bound(BACKENDS["cudnn"].CONTRACTS[0], args, kwargs)
        assert a.layout == "bhsd" and a.q_tensor.is_contiguous() and a.allow_empty_block_nums
        block = a.sparse_block_size
        seen = from_lists(a.q2k_block_nums, a.q2k_block_index, -(-a.k_tensor.shape[2] // block))
        tensors = (a.q_tensor, a.k_tensor, a.v_tensor)
        return by_blocks(*tensors, seen, block, block, a.softmax_scale)

    return {"cudnn.block_sparse_attention.api": {"block_sparse_attention_forward": forward}}


def fake_flash_attn_4():
    class Tensors(types.SimpleNamespace):
        def __init__(self, *args, **kwargs):
            super().__init__(**vars(bound(BACKENDS["flash_attn_4"].CONTRACTS[1], args, kwargs)))

    def forward(*args, **kwargs):
        a = bound(BACKENDS["flash_attn_4"].CONTRACTS[0], args, kwargs)
        q, k, v = (x.transpose(1, 2) for x in (a.q, a.k, a.v))
        t = a.block_sparse_tensors
        assert not t.mask_block_cnt.any()
        seen = from_lists(t.full_block_cnt, t.full_block_idx, -(-k.shape[2] // t.block_size[1]))
        out, lse = by_blocks(q, k, v, seen, *t.block_size, a.softmax_scale)
        return out.transpose(1, 2), lse if a.return_lse else None

    return {
        "flash_attn.cute": {"flash_attn_func": forward},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": Tensors},
    }


def fake_flashinfer():
    made, plan, run = BACKENDS["flashinfer"].CONTRACTS

    class Wrapper:
        def __init__(self, *args, **kwargs):
            bound(made, args, kwargs)

        def plan(self, *args, **kwargs):
            self.plan = bound(plan, args, kwargs)

        def run(self, *args, **kwargs):
            a, p = bound(run, args, kwargs), self.plan
            assert a.q.shape[0] == p.num_qo_heads and a.k.shape[0] == p.num_kv_heads
            outs = []
            for head, seen in enumerate(p.block_mask_map):
                rows, columns = p.block_row_sz[head].long(), p.block_col_sz[head].long()
                assert rows.sum() == a.q.shape[1] and columns.sum() == a.k.shape[1]
                mask = seen.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
                one = [x[None, head : head + 1] for x in (a.q, a.k, a.v)]
                outs.append(by_blocks(*one, mask[None, None], 1, 1, p.sm_scale)[0][0, 0])
            return torch.stack(outs)

    return {"flashinfer": {"VariableBlockSparseAttentionWrapper": Wrapper}}


def fake_sparge():
    def forward(*args, **kwargs):
        a = bound(BACKENDS["sparge"].CONTRACTS[0], args, kwargs)
        assert a.mask_id.is_contiguous() and a.mask_id.dim() == 4 and a.mask_id.dtype == torch.int8
        return by_blocks(a.q, a.k, a.v, a.mask_id.bool(), *BACKENDS["sparge"].block(None), a.scale)[
            0
        ]

    return {"spas_sage_attn.core": {"block_sparse_sage2_attn_cuda": forward}}


def fake_block_sparse_attn():
    def forward(*args, **kwargs):
        a = bound(BACKENDS["block_sparse_attn"].CONTRACTS[0], args, kwargs)
        assert (a.head_mask_type == 1).all() and a.p_dropout == 0.0 and not a.is_causal
        out = torch.empty_like(a.q)
        for one, seen in enumerate(a.base_blockmask):
            rows = slice(*a.cu_seqlens_q[one : one + 2].tolist())
            keys = slice(*a.cu_seqlens_k[one : one + 2].tolist())
            q, k, v = (x.transpose(0, 1)[None] for x in (a.q[rows], a.k[keys], a.v[keys]))
            assert (q.shape[2], k.shape[2]) == (a.max_seqlen_q_, a.max_seqlen_k_)
            got = by_blocks(q, k, v, seen[None], 128, 128, a.softmax_scale)[0]
            out[rows] = got[0].transpose(0, 1)
        return out

    return {"block_sparse_attn": {"block_sparse_attn_func": forward}}


FAKES = {
    "cudnn": (fake_cudnn, [(9, 0), (10, 0), (12, 0)]),
    "flash_attn_4": (fake_flash_attn_4, [(9, 0), (10, 0)]),
    "flashinfer": (fake_flashinfer, [(8, 0)]),
    "sparge": (fake_sparge, [(8, 9), (9, 0)]),
    "block_sparse_attn": (fake_block_sparse_attn, [(8, 0)]),
}
CASES = [(name, capability) for name in NAMES for capability in FAKES[name][1]]


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
        return BACKENDS[name]

    return put


def inputs(layout, heads=3, dim=128):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, layout.seq_len, dim)] * 3
    return [torch.randn(shape, generator=generator) for shape in shapes]


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
    wide = [x.double() for x in (q, k, v)]
    truth = attend(*wide, index, backend="reference", return_lse=True)
    wants_lse = BACKENDS[name].lacks(q, True, False) is None
    got = attend(q, k, v, index, backend=name, return_lse=wants_lse)
    torch.testing.assert_close(got.out.double(), truth.out, atol=1e-5, rtol=1e-5)
    if wants_lse:
        torch.testing.assert_close(got.lse, truth.lse, atol=1e-5, rtol=1e-5)


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
        return F.scaled_dot_product_attention(q, k, v, scale=scale), torch.zeros(q.shape[:3])

    monkeypatch.setitem(globals(), "by_blocks", everything)
    found = selfcheck.examine(module, "cpu", 128, torch.float16)
    assert found.problem is not None and ("aren't 0" in found.problem or "error" in found.problem)


REFUSED = [
    (build_index([Pattern(Window(0, 1, 1), (2, 2, 2))], WHOLE), "are seen in part"),
    (build_index([Pattern(SlidingTile(1, 1, 1), TILES, far=True)], WHOLE), "no far field"),
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


OLD = [("cudnn", (8, 0), "sm_90 to sm_120"), ("flash_attn_4", (8, 9), "sm_90 and sm_100 only"),
       ("flash_attn_4", (12, 0), "sm_90 and sm_100 only"), ("flashinfer", (7, 5), "sm_80 or later"),
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
    monkeypatch.setattr(module, "MOST_ROWS", 10)
    assert "10 blocks of rows" in module.unsupported(inputs(WHOLE)[0], index)


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
