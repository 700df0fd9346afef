"""Many small operations: they run on one thread each, and several of them side by side."""

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
    """Many small operations: waking other threads for each of them costs more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(work: Callable[[int], object], count: int) -> None:
    """Call `work` with 0 to `count - 1`, on as many threads as torch has, each of which computes alone.

    Calls must not depend on one another. What one raises is raised here.
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
    """Call `use(head, cells, sums)` for each head of a batch item and each cells to sum by, side by side.

    As many heads at a time as torch has threads, so that memory doesn't grow with the heads.

    Args:
        item: Whose.
        rows: int64 `[R]`, sampled tokens.
        behind: See `Item.sampled`.
        wanted: The cells.
        layout: Of the item.
        use: Must only touch what is that head's and these cells' own.
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

        side_by_side(one, len(heads) * len(wanted))
