"""Block-sparse attention in Triton, for NVIDIA GPUs from sm_80 on and AMD's CDNA.

`kernel.py` is the kernels, `tables.py` and `work.py` write an index as they read it, `config.py` has the
block sizes of each architecture, `launch.py` calls, `operator.py` makes
torch operators of it for compiled graphs. Blocks that are chosen on the device (`chosen.py`) have tables that
`lay.py` writes there, over what the host knows of them (`frames.py`), and `laid.py` launches it.
Nothing here imports triton before a kernel runs. What
was measured on which GPU is in `docs/measurements/`, what is checked without one in
`docs/reference/gpu-checks.md`.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ...index import SparseIndex
from ...intervals import RowIntervals
from ..attended import Attended
from .chosen import ChosenIndex
from .config import CAPABILITIES, CDNA, Config, configs_for
from .operator import parts_of

HEAD_DIMS = range(16, 129, 8)
DTYPES = (torch.float16, torch.bfloat16)
INTERPRETED = "sm80"  # whose blocks the interpreter takes
_ABSENT = importlib.util.find_spec("triton") is None


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why the kernels can't run this; None if they can."""
    if _absent():
        return "the package triton isn't installed"
    on_cpu = q.is_cpu and interpreted()
    if q.dtype not in DTYPES and not (on_cpu and q.dtype == torch.float32):
        return f"it takes float16 and bfloat16, but q is {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim must be a multiple of 8 from 16 to 128, got {q.shape[-1]}"
    if on_cpu:
        return None
    if not q.is_cuda:
        return f"it runs on CUDA and ROCm GPUs, but q is on {q.device}"
    if _architecture(q.device) is None:
        return f"it needs CUDA sm_80 or later, or {' or '.join(CDNA)}, but {q.device} is another"
    return None


def lacks(q: Tensor, return_lse: bool, mass: bool) -> str | None:
    """Why it can't give the LSE or block mass that is asked for, to follow its name; None if it can."""
    if not mass or torch.compiler.is_compiling() or torch.get_deterministic_debug_mode() < 2:
        return None
    return "its block mass is summed in no fixed order, and torch.use_deterministic_algorithms(True) is set"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex | ChosenIndex,
    rows: RowIntervals | None,
    scale: float,
    return_lse: bool,
    mass_block: int | None,
) -> Attended:
    """Attention over `[B, H, N, D]`; arguments as in `sparse_attention`, or a `ChosenIndex`."""
    if torch.compiler.is_compiling() and isinstance(index, SparseIndex):
        return _traced(q, k, v, index, rows, scale, return_lse, mass_block)
    from . import launch

    with on_device(q):
        got = launch.forward(q, k, v, index, rows, scale, _configs(q))
    return as_asked(got, q, k, index, rows, scale, return_lse, mass_block)


def as_asked(
    got: Attended,
    q: Tensor,
    k: Tensor,
    index: SparseIndex | ChosenIndex,
    rows: RowIntervals | None,
    scale: float,
    return_lse: bool,
    mass_block: int | None,
) -> Attended:
    """What kernels gave that always write the LSE: with block mass, and the LSE, if they are asked for.

    Arguments as of `forward`.
    """
    mass = None
    if mass_block is not None:
        assert got.lse is not None, "the kernels always write it"
        mass = block_mass(q, k, index, got.lse, rows, scale, mass_block)
    return Attended(got.out, got.lse if return_lse else None, mass)


def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex | ChosenIndex,
    lse: Tensor,
    rows: RowIntervals | None,
    scale: float,
    mass_block: int,
) -> Tensor:
    """Mass from a cached LSE; arguments as in `sparse_dit.attention.block_mass`."""
    if torch.compiler.is_compiling() and isinstance(index, SparseIndex):
        parts, groups = parts_of(index), index.max_groups
        return torch.ops.sparse_dit.triton_mass(
            q, k, *parts, lse, *_own(index, rows), scale, mass_block, groups
        )
    from . import launch

    with on_device(q):
        return launch.block_mass(q, k, index, lse, rows, scale, mass_block, _configs(q)[0])


def _traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    rows: RowIntervals | None,
    scale: float,
    return_lse: bool,
    mass_block: int | None,
) -> Attended:
    """`forward` as a node of the graph."""
    parts = parts_of(index)
    out, lse = torch.ops.sparse_dit.triton_attend(q, k, v, *parts, *_own(index, rows), scale)
    mass = None
    if mass_block is not None:
        mass = block_mass(q, k, index, lse, rows, scale, mass_block)
    return Attended(out, lse if return_lse else None, mass)


def _own(index: SparseIndex, rows: RowIntervals | None) -> tuple[Tensor | None, Tensor | None]:
    """The intervals that a call has beside those of the index."""
    return (None, None) if rows is None or rows is index.rows else (rows.start, rows.stop)


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels, which works on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _absent() -> bool:
    return _ABSENT


def on_device(q: Tensor):
    """Launches go to the current device, which must be that of `q`."""
    return torch.cuda.device(q.device if q.is_cuda else -1)


def _configs(q: Tensor) -> tuple[Config, Config]:
    architecture = INTERPRETED if q.is_cpu else _architecture(q.device)
    assert architecture is not None, "`unsupported` says so"
    return configs_for(architecture, q.shape[-1])


@functools.cache
def _architecture(device: torch.device) -> str | None:
    """The device's name in `CONFIGS`, None if it has none."""
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return "gfx9" if name in CDNA else None
    return CAPABILITIES.get(torch.cuda.get_device_capability(device))
