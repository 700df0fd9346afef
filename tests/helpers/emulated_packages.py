"""Kernels of other packages in plain PyTorch: functions with the signatures that were read in their sources,
which compute what those document for their lists. A wrong conversion gives wrong numbers.
"""

import inspect
import itertools
import math
import types

import torch

from sparse_dit.attention import BACKENDS
from sparse_dit.backends.packages import whole

GIVEN = []  # where tensors lay that an emulation was called with


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
    """What all of them document: attention over the blocks that are seen; nothing seen gives 0.

    Heads of q may share those of k and v.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = seen.repeat_interleave(block_q, -2)[..., : q.shape[2], :]
    mask = mask.repeat_interleave(block_k, -1)[..., : k.shape[2]]
    logits = (q.float() @ k.float().mT * scale).masked_fill(~mask, -torch.inf)
    out = logits.softmax(-1).nan_to_num(0.0) @ v.float()
    return out.to(q.dtype), logits.logsumexp(-1)


def given(*tensors):
    """Notes where the tensors lie that a package is given."""
    GIVEN.extend(x.untyped_storage().data_ptr() for x in tensors)


def from_lists(counts, lists, columns):
    assert counts.dtype == lists.dtype == torch.int32
    place = torch.arange(lists.shape[-1]) < counts[..., None]
    seen = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool)
    seen.scatter_(-1, torch.where(place, lists.long(), columns), True)
    return seen[..., :columns]


def fake_cudnn():
    def forward(*args, **kwargs):
        a = bound(BACKENDS["cudnn"].CONTRACTS[0], args, kwargs)
        tensors = (a.q_tensor, a.k_tensor, a.v_tensor)
        given(*tensors)
        assert a.allow_empty_block_nums and not a.pack_gqa
        assert all(x.stride(-1) == 1 for x in tensors)
        by_token = {"bshd": True, "bhsd": False}[a.layout]
        q, k, v = (x.transpose(1, 2) if by_token else x for x in tensors)
        block = a.sparse_block_size
        if whole.capability(None)[0] == 10 and block == 64:
            assert q.shape[1] == k.shape[1]
        for table in (a.q2k_block_nums, a.q2k_block_index):
            assert table.is_contiguous()
            assert table.shape[:3] == (*q.shape[:2], -(-q.shape[2] // block))
        seen = from_lists(a.q2k_block_nums, a.q2k_block_index, -(-k.shape[2] // block))
        out, lse = by_blocks(q, k, v, seen, block, block, a.softmax_scale)
        return out.transpose(1, 2) if by_token else out, lse

    return {"cudnn.block_sparse_attention.api": {"block_sparse_attention_forward": forward}}


def fake_flash_attn_4():
    class Tensors(types.SimpleNamespace):
        def __init__(self, *args, **kwargs):
            super().__init__(**vars(bound(BACKENDS["flash_attn_4"].CONTRACTS[1], args, kwargs)))

    def forward(*args, **kwargs):
        a = bound(BACKENDS["flash_attn_4"].CONTRACTS[0], args, kwargs)
        given(a.q, a.k, a.v)
        q, k, v = (x.transpose(1, 2) for x in (a.q, a.k, a.v))
        t = a.block_sparse_tensors
        assert not a.pack_gqa and not t.mask_block_cnt.any()
        assert t.mask_block_idx.shape[:3] == t.mask_block_cnt.shape == t.full_block_cnt.shape
        assert t.full_block_cnt.shape[0] in (1, len(q)) and t.full_block_cnt.shape[1] == q.shape[1]
        seen = from_lists(t.full_block_cnt, t.full_block_idx, -(-k.shape[2] // t.block_size[1]))
        out, lse = by_blocks(q, k, v, seen, *t.block_size, a.softmax_scale)
        return out.transpose(1, 2), lse if a.return_lse else None

    return {
        "flash_attn.cute": {"flash_attn_func": forward},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": Tensors},
    }


def fake_flashinfer():
    made, plan, run, route_plan, route_run = BACKENDS["flashinfer"].CONTRACTS

    class Wrapper:
        def __init__(self, *args, **kwargs):
            bound(made, args, kwargs)

        def plan(self, *args, **kwargs):
            self.made = bound(plan, args, kwargs)

        def run(self, *args, **kwargs):
            a, p = bound(run, args, kwargs), self.made
            given(a.q, a.k, a.v)
            assert a.q.shape[0] == p.num_qo_heads and a.k.shape[0] == p.num_kv_heads
            assert len(p.block_mask_map) == p.num_kv_heads
            ratio, outs = p.num_qo_heads // p.num_kv_heads, []
            for head, seen in enumerate(p.block_mask_map):
                rows, columns = p.block_row_sz[head].long(), p.block_col_sz[head].long()
                assert rows.sum() == a.q.shape[1] and columns.sum() == a.k.shape[1]
                mask = seen.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
                q = a.q[None, head * ratio : (head + 1) * ratio]
                k, v = (x[None, head : head + 1] for x in (a.k, a.v))
                outs.append(by_blocks(q, k, v, mask[None, None], 1, 1, p.sm_scale))
            out, lse = (torch.cat(x, 1)[0] for x in zip(*outs, strict=True))
            return (out, lse / math.log(2)) if a.return_lse else out

    class Routes:
        def plan(self, *args, **kwargs):
            self.made = bound(route_plan, args, kwargs)

        def run(self, *args, **kwargs):
            return routed(self.made, bound(route_run, args, kwargs))

    return {
        "flashinfer": {"VariableBlockSparseAttentionWrapper": Wrapper},
        "flashinfer.attention.prims_ts": {"BlockSparseTSWrapper": Routes},
    }


def routed(p, a):
    """Exact blocks; with proxy routes every other one by its summary, as so many tokens as it has."""
    given(a.q, a.k, a.v)
    key_heads, size = p.num_kv_heads, p.kv_block_size
    shapes = [(p.batch_size, p.seq_len_q, p.num_qo_heads, p.head_dim)]
    shapes += [(p.batch_size, p.seq_len_kv, key_heads, p.head_dim)] * 2
    for x, shape in zip((a.q, a.k, a.v), shapes, strict=True):
        assert x.shape == shape and x.is_contiguous()
    rows, columns = -(-p.seq_len_q // p.q_block_size), -(-p.seq_len_kv // size)
    assert a.block_indptr.shape == (p.batch_size, key_heads, rows + 1)
    assert a.block_indptr.dtype == a.block_indices.dtype == torch.int32
    counts = a.block_indptr.diff(dim=-1)
    assert counts.min() >= 0 and counts.max() <= p.max_blocks_per_row <= columns
    seen = torch.zeros(p.batch_size, key_heads, rows, columns, dtype=torch.bool)
    for place in itertools.product(*map(range, counts.shape)):
        start, stop = a.block_indptr[place[:2]][place[2] : place[2] + 2]
        assert (a.block_indices[start:stop].diff() > 0).all()
        seen[place][a.block_indices[start:stop].long()] = True
    heads = p.num_qo_heads // key_heads
    assert heads & (heads - 1) == 0 and heads <= 32
    q, k, v = (x.transpose(1, 2) for x in (a.q, a.k, a.v))
    seen = seen.repeat_interleave(heads, 1)
    assert p.use_proxy_routes == (a.k_summary is not None) == (a.v_summary is not None)
    if not p.use_proxy_routes:
        out, _ = by_blocks(q, k, v, seen, p.q_block_size, size, a.sm_scale)
        return out.transpose(1, 2).contiguous()
    assert a.k_summary.shape == a.v_summary.shape == (p.batch_size, columns, key_heads, p.head_dim)
    assert a.k_summary.dtype == k.dtype and a.k_summary.is_contiguous()
    k, v = (
        torch.cat([x, summary.transpose(1, 2)], 2).double().repeat_interleave(heads, 1)
        for x, summary in ((k, a.k_summary), (v, a.v_summary))
    )
    tokens = torch.full((columns,), size, dtype=torch.float64)
    tokens[-1] = p.seq_len_kv - (columns - 1) * size
    exact = seen.repeat_interleave(size, -1)[..., : p.seq_len_kv]
    open_to = torch.cat([exact, ~seen], -1).repeat_interleave(p.q_block_size, 2)[:, :, : q.shape[2]]
    bias = torch.cat([torch.zeros(p.seq_len_kv, dtype=torch.float64), tokens.log()])
    logits = (q.double() @ k.mT * a.sm_scale + bias).masked_fill(~open_to, -torch.inf)
    return (logits.softmax(-1) @ v).to(q.dtype).transpose(1, 2).contiguous()


def fake_sparge():
    def forward(*args, **kwargs):
        a = bound(BACKENDS["sparge"].CONTRACTS[0], args, kwargs)
        given(a.q, a.k, a.v)
        assert a.mask_id.is_contiguous() and a.mask_id.dim() == 4 and a.mask_id.dtype == torch.int8
        assert a.mask_id.shape[:2] == a.q.shape[:2]
        return by_blocks(a.q, a.k, a.v, a.mask_id.bool(), *BACKENDS["sparge"].block(None), a.scale)[
            0
        ]

    return {"spas_sage_attn.core": {"block_sparse_sage2_attn_cuda": forward}}


def fake_block_sparse_attn():
    def forward(*args, **kwargs):
        a = bound(BACKENDS["block_sparse_attn"].CONTRACTS[0], args, kwargs)
        given(a.q, a.k, a.v)
        assert (a.head_mask_type == 1).all() and a.p_dropout == 0.0 and not a.is_causal
        assert a.base_blockmask.is_contiguous()
        out, lses = torch.empty_like(a.q), []
        for one, seen in enumerate(a.base_blockmask):
            rows = slice(*a.cu_seqlens_q[one : one + 2].tolist())
            keys = slice(*a.cu_seqlens_k[one : one + 2].tolist())
            q, k, v = (x.transpose(0, 1)[None] for x in (a.q[rows], a.k[keys], a.v[keys]))
            assert (q.shape[2], k.shape[2]) == (a.max_seqlen_q_, a.max_seqlen_k_)
            got, lse = by_blocks(q, k, v, seen[None], 128, 128, a.softmax_scale)
            out[rows] = got[0].transpose(0, 1)
            lses.append(lse[0].masked_fill(lse[0].isneginf(), torch.inf))
        return (out, torch.stack(lses), None) if a.return_attn_probs else out

    return {"block_sparse_attn": {"block_sparse_attn_func": forward}}


FAKES = {
    "cudnn": (fake_cudnn, [(9, 0), (10, 0), (12, 0)]),
    "flash_attn_4": (fake_flash_attn_4, [(9, 0), (10, 0), (11, 0)]),
    "flashinfer": (fake_flashinfer, [(8, 0), (10, 0), (10, 3)]),
    "sparge": (fake_sparge, [(8, 9), (9, 0)]),
    "block_sparse_attn": (fake_block_sparse_attn, [(8, 0)]),
}
