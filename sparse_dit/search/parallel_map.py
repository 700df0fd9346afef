"""Many small operations in parallel: each runs on one thread, as many at a time as torch has threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..layout import TokenLayout
from .cells import CellSums, cell_table
from .nested import Cells
from .sampling import Item


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
    behind: Tensor | None,
    wanted: Sequence[Cells],
    layout: TokenLayout,
    use: Callable[[int, Cells, CellSums], object],
) -> None:
    """Call `use(head, cells, sums)` in parallel, for each head of a batch item and each kind of cells.

    As many heads are in memory at a time as torch has threads, however many the item has.

    Args:
        item: The batch item, with q, k and v of all heads.
        rows: The sampled query tokens, int64 `[R]`.
        behind: What each head's values are multiplied by, see `Item.sampled`; None for nothing.
        wanted: The kinds of cells that attention is summed by, a token order and a pooling each.
        layout: The token layout of the item.
        use: What is done with the sums. It may only write to what belongs to that head and these cells.
    """
    count, together = item.q.shape[1], torch.get_num_threads()
    for first in range(0, count, together):
        heads = range(first, min(count, first + together))
        sampled = [item.sampled(head, rows, behind) for head in heads]

        def one(number: int, first: int = first, sampled: list = sampled) -> None:
            head, place = divmod(number, len(wanted))
            tile, pool = wanted[place]
            sums = sampled[head].by_cells(cell_table(layout, tile), pool)
            use(first + head, wanted[place], sums)

        parallel_map(one, len(heads) * len(wanted))
