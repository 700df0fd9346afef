"""flashinfer's routes on data-centre Blackwell: exact blocks, and a pooled key for each of the others."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...index import SparseIndex
from . import blocks, whole

PACKAGE, VERSION = "flashinfer-python", "0.7.4"
FILE, WRAPPER = "flashinfer/attention/prims_ts/block_sparse.py", "BlockSparseTSWrapper"
CONTRACTS = (
    whole.Contract(
        PACKAGE, VERSION, FILE, f"{WRAPPER}.plan",
        (
            "batch_size", "seq_len_q", "seq_len_kv", "num_qo_heads", "num_kv_heads", "head_dim",
            "q_block_size", "kv_block_size", "device", "use_block_sparse", "max_blocks_per_row",
            "use_kv_valid_bits", "sparse_format", "use_proxy_routes", "mask_type",
            "share_pattern_across_kv_heads", "q_data_type", "k_data_type", "v_data_type",
            "kv_data_type", "o_data_type", "sage_config", "softmax_rescale_threshold_log2",
        ),
    ),
    whole.Contract(
        PACKAGE, VERSION, FILE, f"{WRAPPER}.run",
        (
            "q", "k", "v", "block_indptr", "block_indices", "exact_block_bits", "k_summary",
            "v_summary", "kv_valid_bits", "sm_scale", "out", "validate", "sage",
        ),
    ),
)  # fmt: skip
CAPABILITIES = ((10, 0), (10, 3), (10, 7))
HEAD_DIM = 128
SIZES = ((128, 128), (128, 64), (64, 128), (64, 64))
MOST_SHARING = 32  # queries' heads to one of keys, a power of 2
CAPACITY = 16  # blocks a row: a plan is made anew only where one more of these is needed


class Launch(NamedTuple):
    """Heads that go together, since a plan either pools the rest or leaves it out.

    Args:
        queries, keys: int64, heads of q and of k; None for all.
        pooled: Whether what isn't seen is pooled.
        offsets: int32 `[B, key heads, Qb + 1]` into `listed`.
        listed: int32, key blocks.
        most: The largest number of blocks of a row.
    """

    queries: Tensor | None
    keys: Tensor | None
    pooled: bool
    offsets: Tensor
    listed: Tensor
    most: int


def here(q: Tensor) -> bool:
    """Whether the routes run where q is, at its head_dim."""
    return whole.capability(q.device) in CAPABILITIES and q.shape[-1] == HEAD_DIM


def stream(device: torch.device) -> int:
    """The current stream: what a plan writes to is shared by the calls of one alone."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def attention(q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, scale: float) -> Tensor:
    """Attention of sorted tokens, exact and pooled.

    Args:
        q: `[B, H, N, D]`, any strides.
        k, v: `[B, key heads, M, D]`; heads with the same keys have the same pattern.
        index: Whole blocks of one of `SIZES`.
        scale: Factor of the logits.

    Returns:
        `[B, H, N, D]`.
    """
    size = whole.fit(index, SIZES, far=True)
    assert size is not None, "`unsupported` has looked"
    ratio = q.shape[1] // k.shape[1]
    if ratio > MOST_SHARING or ratio & (ratio - 1):
        k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    found = blocks.kept(
        index,
        ("flashinfer routes", size, len(q), k.shape[1]),
        lambda: launches(index, size, len(q), k.shape[1]),
    )
    if len(found) == 1:
        return launched(q, k, v, found[0], size, scale)
    out = torch.empty_like(q)
    for launch in found:
        heads = (q[:, launch.queries], k[:, launch.keys], v[:, launch.keys])
        out[:, launch.queries] = launched(*heads, launch, size, scale)
    return out


def launches(index: SparseIndex, size: tuple[int, int], batch: int, key_heads: int) -> list[Launch]:
    """The calls that an index takes: one, or one for heads that pool the rest and one for others."""
    ratio, device = index.num_heads // key_heads, index.entries[0].q_offsets.device
    entries = [index.entries[p] for p in index.head_to_pattern[::ratio]]
    pools = [None if entry.is_dense else entry.far is not None for entry in entries]
    counts, table = (x[::ratio].cpu() for x in blocks.block_lists(index, *size))
    found = []
    for pooled in (True, False):
        heads = [
            h
            for h, one in enumerate(pools)
            if one is pooled or (one is None and pooled == any(pools))
        ]
        if not heads:
            continue
        keys = torch.tensor(heads, device="cpu")
        offsets, listed = rows_of(counts[keys], table[keys], batch)
        queries = (keys[:, None] * ratio + torch.arange(ratio, device="cpu")).flatten()
        every = len(heads) == key_heads
        found.append(
            Launch(
                None if every else queries.to(device), None if every else keys.to(device), pooled,
                offsets.to(device), listed.to(device), int(counts[keys].max()),
            )
        )  # fmt: skip
    return found


def rows_of(counts: Tensor, table: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Lists `[H, Qb]` and `[H, Qb, K]` as CSR of all items of a batch, one after another."""
    listed = table[torch.arange(table.shape[-1], device="cpu") < counts[..., None]]
    ends = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
    rows = torch.arange(counts.shape[1] + 1, device="cpu")
    one = ends[torch.arange(len(counts), device="cpu")[:, None] * counts.shape[1] + rows]
    offsets = one + torch.arange(batch, device="cpu")[:, None, None] * len(listed)
    listed = listed if len(listed) else listed.new_zeros(1)  # of a kernel that is given a pointer
    return offsets.int(), listed.repeat(batch)


def launched(
    q: Tensor, k: Tensor, v: Tensor, launch: Launch, size: tuple[int, int], scale: float
) -> Tensor:
    """One call of the wrapper."""
    by_token = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # nothing if they lie so
    summaries = {}
    if launch.pooled:
        summaries = {
            f"{name}_summary": means(x, size[1]) for name, x in zip("kv", by_token[1:], strict=True)
        }
    columns = -(-k.shape[2] // size[1])
    most = min(max(1, -(-launch.most // CAPACITY)) * CAPACITY, columns)
    wrapper = planned(
        q.shape, k.shape, size, most, launch.pooled, q.dtype, q.device, stream(q.device)
    )
    out = wrapper.run(*by_token, launch.offsets, launch.listed, sm_scale=scale, **summaries)
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=32)
def planned(
    q_shape: torch.Size,
    k_shape: torch.Size,
    size: tuple[int, int],
    most: int,
    pooled: bool,
    dtype: torch.dtype,
    device: torch.device,
    on: int,
) -> Any:
    """A planned wrapper for such calls of one stream: it keeps room, no lists."""
    from flashinfer.attention import prims_ts  # pyright: ignore[reportMissingImports]

    wrapper = getattr(prims_ts, WRAPPER)()  # a checker finds the file beside this one
    wrapper.plan(
        q_shape[0], q_shape[2], k_shape[2], q_shape[1], k_shape[1], q_shape[3], *size, device=device,
        max_blocks_per_row=most, use_proxy_routes=pooled, q_data_type=dtype,
    )  # fmt: skip
    return wrapper


def means(x: Tensor, block: int) -> Tensor:
    """Means of blocks of tokens of `[B, M, H, D]`, summed in float32: `[B, ceil(M / block), H, D]`."""
    whole_tokens = x.shape[1] // block * block
    parts = [x[:, :whole_tokens].unflatten(1, (-1, block)).mean(2, dtype=torch.float32)]
    if whole_tokens < x.shape[1]:
        parts.append(x[:, whole_tokens:].mean(1, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 1).to(x.dtype)
