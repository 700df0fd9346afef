"""Block-sparse attention in Gluon, for NVIDIA's sm_90: heads whose tokens lie side by side, loaded by TMA.

`kernel.py` and `masks.py` are the kernel, `tables.py` writes a pattern as it reads it, `work.py` decides
which heads it takes; the others run, in the same call, in the Triton backend's kernel, which gathers keys.
`config.py` has the block sizes, `launch.py` calls. It was compiled, and its source was executed in a stand-in
for Gluon, but it never ran on a GPU: `auto` doesn't take it. What is checked is in
`docs/reference/gpu-checks.md`.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from ...index import SparseIndex, build_index
from ...intervals import RowIntervals
from ...layout import TokenLayout
from ...patterns import Dense, Pattern, Window
from .. import triton
from ..attended import Attended
from .config import CONFIGS
from .work import choice_of

CAPABILITY = (9, 0)
DTYPES = (torch.float16, torch.bfloat16)


def unsupported(q: Tensor, index: SparseIndex) -> str | None:
    """Why the kernel can't run this; None if it can."""
    if not _on_hopper(q.device):
        return f"it runs on NVIDIA's sm_90, but q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, but q is {q.dtype}"
    if q.shape[-1] not in CONFIGS:
        return f"head_dim must be {' or '.join(map(str, CONFIGS))}, got {q.shape[-1]}"
    if torch.compiler.is_compiling():
        return "it can't be traced into a compiled graph"
    if reason := _missing():
        return reason
    choice = choice_of(index, q.shape[-1], masked=index.rows is not None)
    if not any(choice.tables):
        return (
            "it loads neighbouring tokens together, but no head's tiles and keys lie side by side; "
            "order tokens once per step, or take backend 'triton'"
        )
    return None


def lacks(q: Tensor, return_lse: bool, mass: bool) -> str | None:
    """Why it can't give the LSE or block mass that is asked for; None if it can."""
    return triton.lacks(q, return_lse, mass)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: SparseIndex,
    rows: RowIntervals | None,
    scale: float,
    return_lse: bool,
    mass_block: int | None,
) -> Attended:
    """Attention over `[B, H, N, D]`; arguments as in `sparse_attention`."""
    from . import launch

    with triton.on_device(q):
        got = launch.forward(q, k, v, index, rows, scale)
    return triton.as_asked(got, q, k, index, rows, scale, return_lse, mass_block)


def block_mass(
    q: Tensor,
    k: Tensor,
    index: SparseIndex,
    lse: Tensor,
    rows: RowIntervals | None,
    scale: float,
    mass_block: int,
) -> Tensor:
    """Mass from a cached LSE, by the Triton backend; arguments as in `sparse_dit.attention.block_mass`."""
    return triton.block_mass(q, k, index, lse, rows, scale, mass_block)


def check_cases() -> list[tuple[SparseIndex, RowIntervals | None]]:
    """What the check before first use computes besides its own cases: whole steps of every kind."""
    layout = TokenLayout.video(5, 16, 16, text_after=9)
    near = Pattern(Window(frames=0), tile=(1, None, None), far=True, pool=4)
    patterns = [near, Pattern(Dense()), near, Pattern(Window(frames=1), tile=(1, None, None))]
    return [(build_index(patterns, layout), None)]


@functools.cache
def _on_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == CAPABILITY


@functools.cache
def _missing() -> str | None:
    """Why the kernel can't be imported; None if it can. Gluon is part of triton, and changes with it."""
    try:
        importlib.import_module(".launch", __name__)
    except ImportError as error:
        return f"it needs Gluon, of triton 3.6 or later: {error}"
    return None
