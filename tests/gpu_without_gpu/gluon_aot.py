"""The Gluon kernel compiled for sm_90, which isn't here, and what its machine code says.

`python -m tests.gpu_without_gpu.gluon_aot` compiles every configuration, dtype and case (some minutes),
prints what it finds, and ends with 1 if something is wrong. With `--record` it writes the instructions of a
round, which `test_gluon_compiled.py` compares with, for the kernels of that test.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from sparse_dit.backends.gluon import kernel
from sparse_dit.backends.gluon.config import ROWS, Config, configs_for
from sparse_dit.backends.gluon.launch import block_layout
from tests.gpu_without_gpu.sass_flow import uninitialised
from tests.gpu_without_gpu.triton_aot import count, hot_loops, instructions, report, said

RECORD = Path(__file__).parents[1] / "golden" / "gluon_instructions.json"
SHARED = 227 * 1024  # bytes that a block may have
REGISTERS = 64 * 1024  # of a multiprocessor
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {"Lse": "fp32", "Cells": "i32", "RowStart": "i32", "RowStop": "i32"}
POINTERS |= {"Tiles": "i32", "Steps": "i32", "Masks": "i32"}
ONE_IN_FLIGHT = r"WARPGROUP\.DEPBAR\S* gsb0, 0x1"


class Case(NamedTuple):
    """One kernel to compile."""

    head_dim: int
    config: Config
    mask: int = 0
    far: bool = False
    dtype: str = "bf16"

    def __str__(self) -> str:
        c = self.config
        return (
            f"{self.dtype} d{self.head_dim} {c.block_m}x{c.block_n} s{c.stages} "
            f"mask {self.mask}{' far' * self.far}"
        )


def case_of(
    head_dim: int, size: int, mask: int = 0, far: bool = False, dtype: str = "bf16"
) -> Case:
    """The case of a configuration in the table, small tiles (0) or large ones (1)."""
    config = configs_for(head_dim, far=far, masked=mask > 0)[size]
    return Case(head_dim, config, mask, far, dtype)


class Built(NamedTuple):
    """What a compiled kernel is made of.

    Args:
        registers: Of a thread at launch.
        spilled: Bytes of stack, and loads and stores of it.
        shared: Bytes of shared memory.
        loads: TMA loads.
        instructions: Of a round: whose keys all rows see; of pooled keys, if there are such; masked.
        one_in_flight: For each of these, how often it waits for all products but one.
        uninitialised: Uniform registers that may be read before they are written, see `sass_flow.py`.
    """

    registers: int
    spilled: int
    shared: int
    loads: int
    instructions: tuple[int, ...]
    one_in_flight: tuple[int, ...]
    uninitialised: tuple[str, ...]

    def faults(self, case: Case) -> list[str]:
        """What is wrong with it."""
        config, found = case.config, list(self.uninitialised)
        blocks, threads = 2 if config.consumers == 1 else 1, 128 * (config.consumers + 1)
        if self.spilled:
            found.append(f"spills {self.spilled}")
        if self.registers != config.registers or self.registers * threads * blocks > REGISTERS:
            found.append(
                f"{self.registers} registers don't fit {blocks} blocks of {threads} threads"
            )
        if self.shared * blocks > SHARED:
            found.append(f"{self.shared} bytes of shared memory don't fit {blocks} blocks")
        if not self.loads:
            found.append("no TMA load")
        kinds = 3 if case.far and not case.mask else 2
        if len(self.instructions) != kinds or set(self.one_in_flight) != {1}:
            found.append(
                f"rounds {self.instructions} wait for one product {self.one_in_flight} times"
            )
        return found


def compiled(case: Case) -> Built:
    """Compile the kernel and read its code."""
    config = case.config
    constants: dict[str, object] = {
        "D": case.head_dim, "BLOCK_N": config.block_n, "STAGES": config.stages,
        "CONSUMERS": config.consumers, "MASK": case.mask, "FAR": case.far,
    }  # fmt: skip
    if not case.far:
        constants["PooledBlocks"] = None
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.attend.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("Blocks"):
            rows = ROWS if name == "QueryBlocks" else config.block_n
            block, layout = block_layout(rows, case.head_dim, DTYPES[case.dtype])
            signature[name] = f"tensordesc<{case.dtype}{block},{layout!r}>"
        elif name in POINTERS or name == "Out":
            signature[name] = "*" + POINTERS.get(name, case.dtype)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    built = triton.compile(
        GluonASTSource(kernel.attend, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": config.registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = said("cuobjdump", "-res-usage", file.name)
        code = said("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    lines = instructions(code)
    loops = [body for body in hot_loops(lines, r"HGMMA\.") if count(body, r"MUFU\.EX2") > 8]
    loops = loops[: len(loops) // config.consumers]  # consumers have the same
    return Built(
        registers,
        stack + count(lines, r"(LDL|STL)\b"),
        built.metadata.shared,
        count(lines, r"UTMALDG"),
        tuple(map(len, loops)),
        tuple(count(body, ONE_IN_FLIGHT) for body in loops),
        tuple(uninitialised(code)),
    )


def tested() -> Iterator[Case]:
    """What the tests compile: both head_dims, dtypes and sizes of tiles, with and without all there is."""
    yield case_of(128, 1)
    yield case_of(128, 1, 2, True, "fp16")
    yield case_of(128, 0, 0, True)
    yield case_of(64, 1, 1)


def every() -> Iterator[Case]:
    """All head_dims, configurations, cases and dtypes."""
    cases = itertools.product((64, 128), (0, 1), (0, 1, 2), (False, True), DTYPES)
    for case in cases:
        yield case_of(*case)


def main(arguments: list[str]) -> int:
    """Compile, print and record; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="Compile the Gluon kernel for sm_90.")
    parser.add_argument("--record", action="store_true", help="write what the tests compare with")
    recording = parser.parse_args(arguments).record
    return report(tested() if recording else every(), compiled, RECORD if recording else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
