"""The kernel's shared library: found beside this file, opened once, called through ctypes.

It is built by `setup.py` from `csrc/` and knows neither Python nor torch. Without it (there was no
compiler at installation) `PROBLEM` says why, and the package works on with a slower backend.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

import torch

ABI_VERSION = 4
NO_MEMORY = 13  # of enum Status in csrc/abi.h
VARIANT_VARIABLE = "SPARSE_DIT_CPU_VARIANT"  # for tests: the variant to run instead of the best
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
FILE = Path(__file__).with_name(f"libsparse_dit_cpu{SUFFIX}")

# struct Problem of csrc/abi.h: what is called how, in this order
PROBLEM_FIELDS = """
    abi_version dtype batch heads kv_heads queries keys channels value_channels
    q k v out lse mass lse_in row_start row_stop index index_words
    q_strides k_strides v_strides out_strides start_strides stop_strides
    mass_block mass_groups threads variant scale
"""
PACK_PROBLEM = struct.Struct("=9q10Qq20q4qd").pack

# the same for the structs of estimates
SUMS_FIELDS = """
    abi_version dtype batch heads kv_heads queries keys channels sampled listed local
    q k rows start stop head_list columns diagonals q_strides k_strides threads variant scale
"""
PACK_SUMS = struct.Struct("=11q8Q8q2qd").pack
CHOICE_FIELDS = "abi_version heads candidates scores costs forced budget chosen threads"
PACK_CHOICE = struct.Struct("=3q3QqQq").pack
RUNS_FIELDS = "abi_version heads queries keys chosen offsets runs threads"
PACK_RUNS = struct.Struct("=4q3Qq").pack
MEANS_FIELDS = """
    abi_version dtype batch heads tokens channels stretches x order bounds means strides threads
"""
PACK_MEANS = struct.Struct("=7q4Q4qq").pack
BLOCKS_FIELDS = """
    abi_version heads tokens blocks groups chosen bounds owner pool_of lay
    offsets runs far_offsets far_runs threads
"""
PACK_BLOCKS = struct.Struct("=5q4Qq4Qq").pack


class Library:
    """An open library.

    Attributes:
        variants: Names of the compiled variants, best first.
        runnable: Those that this machine runs.
        variant: Place in `variants` of the one to run; -1 for the best that runs.
        shares_pool: Whether its threads are those of torch's own OpenMP pool.

    Args:
        file: The shared library.
        variant: Name of the variant to run; None for the best.

    Raises:
        OSError: If the file can't be loaded.
        ImportError: If it is of another version.
        ValueError: If it can't run the variant here.
    """

    def __init__(self, file: Path, variant: str | None = None) -> None:
        self.file = file
        self._dll = dll = ctypes.CDLL(str(file))
        dll.sparse_dit_abi.restype = ctypes.c_int64
        if (version := dll.sparse_dit_abi()) != ABI_VERSION:
            raise ImportError(
                f"{file} has interface {version}, but this package needs {ABI_VERSION}; reinstall it"
            )
        self._attend, self._sums, self._choose, self._lay_runs, self._means, self._lay_blocks = (
            _function(getattr(dll, f"sparse_dit_{name}"), ctypes.c_int64, ctypes.c_char_p)
            for name in ("attend", "sums", "choose", "lay_runs", "means", "lay_blocks")
        )
        self._error = _function(dll.sparse_dit_error, ctypes.c_char_p, ctypes.c_int64)
        self._multiply_adds = _function(
            dll.sparse_dit_multiply_adds, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64
        )
        runs = _function(dll.sparse_dit_runs, ctypes.c_int64, ctypes.c_int64)
        names = _function(dll.sparse_dit_variants, ctypes.c_char_p)().decode()
        self.variants = tuple(names.split())
        self.runnable = tuple(name for i, name in enumerate(self.variants) if runs(i))
        self.variant = -1
        self.use_variant(variant)
        pool = _torch_pool()
        self.shares_pool = pool is not None
        _function(dll.sparse_dit_use_gomp, None, ctypes.c_void_p)(pool)

    @property
    def running(self) -> str:
        """Name of the variant that runs."""
        return self.runnable[0] if self.variant < 0 else self.variants[self.variant]

    def use_variant(self, name: str | None) -> None:
        """Run the variant of this name from now on; None for the best.

        Raises:
            ValueError: If it wasn't compiled, or this machine can't run it.
        """
        if name is not None and name not in self.runnable:
            kind = "runs here" if name in self.variants else "was compiled"
            raise ValueError(
                f"no variant {name!r} of the CPU kernel {kind}; {VARIANT_VARIABLE} must be one of "
                f"{', '.join(self.runnable)}, or unset"
            )
        self.variant = -1 if name is None else self.variants.index(name)

    def multiply_adds(self, turns: int) -> int:
        """Run float32 multiply-adds on registers alone, with the vectors of the running variant.

        Returns:
            The number of floating-point operations: over the time, the peak of one thread.
        """
        return self._multiply_adds(self.variant, turns)

    def attend(self, problem: bytes) -> None:
        """Run a packed `Problem`. Releases the GIL; what it points to must stay alive meanwhile.

        Raises:
            ValueError: If the library refuses it, with its reason.
            MemoryError: If it got no memory for its buffers.
        """
        self._check(self._attend(problem))

    def sums(self, problem: bytes) -> None:
        """Run a packed `SumsProblem`; as `attend`."""
        self._check(self._sums(problem))

    def choose(self, problem: bytes) -> None:
        """Run a packed `ChoiceProblem`; as `attend`."""
        self._check(self._choose(problem))

    def lay_runs(self, problem: bytes) -> None:
        """Run a packed `RunsProblem`; as `attend`."""
        self._check(self._lay_runs(problem))

    def means(self, problem: bytes) -> None:
        """Run a packed `MeansProblem`; as `attend`."""
        self._check(self._means(problem))

    def lay_blocks(self, problem: bytes) -> None:
        """Run a packed `BlocksProblem`; as `attend`."""
        self._check(self._lay_blocks(problem))

    def _check(self, status: int) -> None:
        if status:
            error = MemoryError if status == NO_MEMORY else ValueError
            raise error(self._error(status).decode())


def _function(function, returns, *takes):
    function.restype, function.argtypes = returns, takes
    return function


def _torch_pool() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP library that torch uses; None if it uses none.

    A second OpenMP library in the process would bring a second pool of threads, which fights with
    torch's. So this asks the loader what torch's own extension module sees, and loads nothing.
    """
    no_load = getattr(os, "RTLD_NOLOAD", None)
    if no_load is None:  # Windows
        return None
    try:
        torch_itself = ctypes.CDLL(torch._C.__file__, mode=no_load | os.RTLD_LAZY)
        return ctypes.cast(torch_itself.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):  # no such function: torch was built without OpenMP
        return None


def load(file: Path = FILE) -> tuple[Library | None, str | None]:
    """The library, or why there is none.

    Raises:
        ValueError: If the environment asks for a variant that doesn't run here.
    """
    if not file.exists():
        return None, (
            f"the native CPU kernel is not built ({file.name} is missing); reinstall sparse_dit where "
            "there is a C++ compiler (pip install -v shows why it was not built)"
        )
    try:
        return Library(file, os.environ.get(VARIANT_VARIABLE)), None
    except (OSError, ImportError, AttributeError) as error:
        return None, f"the native CPU kernel can't be used: {error}"


# opened on import, so that nothing is left to do inside a traced or compiled function
LIBRARY, PROBLEM = load()
