"""The processor's own peak: a yardstick that does not depend on how well a library is tuned for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ..backends.cpu import library

TURNS = 2_000_000  # some milliseconds


class PeakLoop:
    """Float32 multiply-adds on registers alone, on several threads at once; to be timed by calling it.

    Args:
        kernel: Whose vectors are used: those of the variant that it runs.
        threads: How many.
    """

    def __init__(self, kernel: library.Library, threads: int) -> None:
        self._kernel, self._threads = kernel, threads
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self) -> int:
        """Run once.

        Returns:
            The number of floating-point operations, of all threads.
        """
        if self._threads == 1:
            return self._kernel.multiply_adds(TURNS)
        return sum(self._pool.map(self._kernel.multiply_adds, [TURNS] * self._threads))


def peak_loop(threads: int) -> PeakLoop | None:
    """The loop for the native kernel's running variant; None without the kernel."""
    return None if library.LIBRARY is None else PeakLoop(library.LIBRARY, threads)
