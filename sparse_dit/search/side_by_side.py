"""Many small operations: they run on one thread each, and heads on several threads side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Many small operations: waking other threads for each of them costs more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def each_head(work: Callable[[int], object], count: int) -> None:
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
