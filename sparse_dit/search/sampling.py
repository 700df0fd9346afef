"""Which forwards are sampled, the sampled rows of a call's heads, and the attention of a call over an index.

Sampled rows are many small operations. On a CPU they run in parallel, each on one thread, as many at a time
as torch has threads. On another device they run there, for several heads together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attend_call import attend_call
from ..call import AttentionCall, StepContext, with_bias
from ..index import SparseIndex
from ..layout import TokenLayout
from .cells import CellSums, SampledRows, cell_table, sampled_rows
from .nested import Cells

MEMORY = 2 << 30  # bytes that sums of heads may take on a GPU
LIVE = 8  # tensors `[R, C, D]` of a head that are there at a time, at most


def in_turn(context: StepContext) -> bool:
    """Whether a forward is recorded: the conditional one at even steps, the unconditional one at odd steps.

    In a pipeline whose branches aren't told apart all forwards are.
    """
    return context.branch in ("any", "uncond" if context.step % 2 else "cond")


def turns(steps: int, looked_at: int) -> dict[int, str]:
    """The steps of a run that are recorded, evenly spread, and the guidance branch at each, in turn."""
    chosen = range(min(steps, looked_at))
    return {number * steps // len(chosen): "uncond" if number % 2 else "cond" for number in chosen}


def whole_layout(call: AttentionCall) -> TokenLayout | None:
    """The token layout of a call that can be sampled; None for any other call.

    Such a call is plain attention over all tokens of its layout, some of them video, at a known noise level.
    """
    layout = call.context.layout
    if layout is None or call.context.sigma is None or call.unsupported is not None:
        return None
    whole = call.q.shape[1] == call.k.shape[1] == layout.seq_len
    return layout if whole and layout.num_grid else None


@dataclass(frozen=True, eq=False)
class Item:
    """One item of a call's batch; H heads, fewer of keys and values if several share them.

    Args:
        q, k, v: `[N, H, D]` on the call's device, a bias on the logits being part of queries and keys.
        valid: Keys from here on are padding.
        scale: Factor of the logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: int
    scale: float

    def sampled(self, heads: range, rows: Tensor, projection: Tensor | None) -> SampledRows:
        """The exact attention of sampled rows of h heads that follow each other; see `sampled_heads`."""
        group, some = self.q.shape[1] // self.k.shape[1], slice(heads.start, heads.stop)
        q, k, v = (x.movedim(1, 0) for x in (self.q, self.k, self.v))
        if group > 1:
            shared = torch.arange(heads.start, heads.stop, device=k.device) // group
            q, k, v = q[some], k.index_select(0, shared), v.index_select(0, shared)
        else:
            q, k, v = q[some], k[some], v[some]
        if projection is not None:
            v = v.float() @ projection[some].to(v.device)
        return sampled_rows(q, k, v, rows, self.scale, self.valid)


def items_of(call: AttentionCall, layout: TokenLayout) -> Iterator[Item]:
    """The items of a call over a layout's sequence."""
    scale = call.scale if call.scale is not None else call.q.shape[-1] ** -0.5
    for batch in range(call.q.shape[0]):
        valid = layout.seq_len if call.kv_len is None else int(call.kv_len[batch])
        q, k, v = (x[batch].detach() for x in (call.q, call.k, call.v))
        if call.bias is not None:
            bias = call.bias[None, batch].float()
            (q, k) = (
                x[0] for x in with_bias(q[None].float(), k[None].float(), v[None], bias, scale)[:2]
            )
        yield Item(q, k, v, valid, scale)


def sampled_heads(
    call: AttentionCall,
    layout: TokenLayout,
    rows: Tensor,
    projection: Tensor | None,
    heads: Sequence[int] | None = None,
) -> Iterator[tuple[int, SampledRows]]:
    """The exact attention of sampled rows for each batch item and head, `[1, ...]`: `(head, rows)`.

    Keys that are padding get nothing; a bias on the logits is part of queries and keys.

    Args:
        call: The attention call.
        layout: The token layout of its sequence.
        rows: int64 `[R]`, sampled tokens.
        projection: `[H, D, D]` that values are multiplied by, see `projections`; None for heads' own outputs.
        heads: The numbers of the heads to sample; None for all.
    """
    for item in items_of(call, layout):
        for head in range(item.q.shape[1]) if heads is None else heads:
            yield head, item.sampled(range(head, head + 1), rows, projection)


def attention_over(call: AttentionCall, index: SparseIndex) -> Tensor:
    """Attention of a call over the index, `[B, N, H, D]`."""
    return attend_call(call, index.to(call.q.device))[0]


def exact_rows(call: AttentionCall, rows: Tensor) -> Tensor:
    """Dense attention of some rows of a call, on its device, `[B, R, H, D]`.

    Args:
        call: Plain attention.
        rows: int64 `[R]`, tokens.
    """
    q, k, v, scale = _by_head(call)
    mask = None
    if call.kv_len is not None:
        mask = (torch.arange(k.shape[2], device=k.device) < call.kv_len[:, None])[:, None, None]
    shared = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(
        q[:, :, rows.to(q.device)], k, v, attn_mask=mask, scale=scale, enable_gqa=shared
    )
    return out[..., : call.v.shape[-1]].transpose(1, 2)


def _by_head(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v `[B, H, N, D]`, a bias on the logits in extra channels, and the factor of the logits."""
    q, k, v = call.q, call.k, call.v
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    if call.bias is not None:
        q, k, v = with_bias(q, k, v, call.bias, scale)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread inside the block.

    For many small operations: waking other threads for each of them costs more time than they save.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def parallel_map(work: Callable[[int], object], count: int) -> None:
    """Call `work` with each number from 0 to `count - 1`, on as many threads as torch has.

    Each call computes on a single thread. Calls must not depend on one another. Their results are dropped;
    what one raises is raised here.
    """
    threads = min(torch.get_num_threads(), count)
    inference = torch.is_inference_mode_enabled()

    def run(number: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both are a thread's own
            work(number)

    with one_thread():
        if threads <= 1:
            for number in range(count):
                run(number)
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(run, range(count)))


def each_sum(
    item: Item,
    rows: Tensor,
    projection: Tensor | None,
    wanted: Sequence[Cells],
    layout: TokenLayout,
    use: Callable[[range, Cells, CellSums], object],
) -> None:
    """Call `use(heads, cells, sums)` for the heads of a batch item and each kind of cells.

    On a CPU for one head after another, in parallel: as many are in memory at a time as torch has threads. On
    another device for several heads together, as many as `MEMORY` has room for.

    Args:
        item: The batch item, with q, k and v of all heads.
        rows: The sampled query tokens, int64 `[R]`.
        projection: What each head's values are multiplied by, see `Item.sampled`; None for nothing.
        wanted: The kinds of cells that attention is summed by, a token order and a pooling each.
        layout: The token layout of the item.
        use: What is done with the sums. It may only write to what belongs to that head and these cells.
    """
    count, device = item.q.shape[1], item.q.device
    tables = {tile: cell_table(layout, tile, device) for tile, _ in wanted}
    in_parallel, together = device.type == "cpu", torch.get_num_threads()
    if not in_parallel:
        most = max(len(table.tokens) for table in tables.values())
        together = max(1, MEMORY // (LIVE * 4 * len(rows) * most * item.v.shape[-1]))
    for first in range(0, count, together):
        heads = range(first, min(count, first + together))
        each = [range(head, head + 1) for head in heads] if in_parallel else [heads]
        sampled = [item.sampled(some, rows, projection) for some in each]

        def one(number: int, each: list = each, sampled: list = sampled) -> None:
            place, kind = divmod(number, len(wanted))
            tile, pool = wanted[kind]
            use(each[place], wanted[kind], sampled[place].by_cells(tables[tile], pool))

        if in_parallel:
            parallel_map(one, len(each) * len(wanted))
        else:
            for number in range(len(wanted)):
                one(number)
