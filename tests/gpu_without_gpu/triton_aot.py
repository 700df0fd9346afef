"""The Triton kernels compiled for GPUs that aren't here, and what their machine code says.

`python -m tests.gpu_without_gpu.triton_aot` compiles every architecture, head_dim, dtype and case
(some minutes), prints what it finds, and ends with 1 if a kernel spills or misses tensor cores. With
`--record` it writes the instructions of a step, which `test_triton_compiled.py` compares with, for the
kernels of that test.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_dit.backends.triton import kernel, lay
from sparse_dit.backends.triton.config import Config, configs_for
from sparse_dit.backends.triton.laid import CHUNK, WARPS
from tests.gpu_without_gpu.sass_flow import uninitialised

RECORD = Path(__file__).parents[1] / "golden" / "triton_instructions.json"
BIN = Path(nvidia.__file__).parent / "bin"
# target -> name in the table of configurations, tensor-core instruction, shared memory of a block in bytes
TARGETS = {
    "sm_80": ("sm80", r"HMMA\.", 163 * 1024),
    "sm_86": ("sm86", r"HMMA\.", 99 * 1024),
    "sm_89": ("sm86", r"HMMA\.", 99 * 1024),
    "sm_90": ("sm90", r"HGMMA\.", 227 * 1024),
    "sm_100": ("sm100", r"UTC\w*MMA", 227 * 1024),
    "sm_120": ("sm120", r"HMMA\.", 99 * 1024),
    "gfx942": ("gfx9", r"v_mfma", 64 * 1024),
    "gfx950": ("gfx9", r"v_mfma", 160 * 1024),
}
WIDE = r"LDGSTS\S*\.128"  # what head_dim 80 and 96 have beyond 64 may take half that
PLAIN = {"MASK": 0, "HAS_FAR": False, "PARTIAL": False}
FAR = {"MASK": 0, "HAS_FAR": True, "PARTIAL": False}
FULL = {"MASK": 2, "HAS_FAR": True, "PARTIAL": False}
PARTIAL = {"MASK": 0, "HAS_FAR": True, "PARTIAL": True}
POINTERS = {"Work": "i32", "Heads": "i64", "Slots": "i64", "Cells": "i32"}
POINTERS |= {"RowStart": "i32", "RowStop": "i32", "Lse": "fp32", "Mass": "fp32"}
TENSORS = ("Q", "K", "V", "Out", "Pooled")


class Case(NamedTuple):
    """One kernel to compile."""

    target: str
    head_dim: int
    config: Config
    flags: dict[str, int] = PLAIN
    dtype: str = "bf16"

    def __str__(self) -> str:
        c = self.config
        flags = "".join(name[0] + name[-1] for name, on in self.flags.items() if on) or "plain"
        return (
            f"{self.target} {self.dtype} d{self.head_dim} {c.block_m}x{c.block_n} "
            f"w{c.warps} s{c.stages} {flags}"
        )


class Step(NamedTuple):
    """One step of a loop over keys.

    Args:
        instructions: How many it has.
        tensor: Tensor-core instructions among them.
        loads: Loads among them that move keys and values, and what is known of cells.
        wide: Those of 16 bytes a thread; asynchronous on NVIDIA.
    """

    instructions: int
    tensor: int
    loads: int
    wide: int


class Built(NamedTuple):
    """What a compiled kernel is made of.

    Args:
        registers: Of a thread.
        spilled: Bytes of stack, and loads and stores of it.
        shared: Bytes of shared memory.
        exact: A step whose keys all rows see.
        pooled: A step of pooled keys; None if the kernel has none.
        uninitialised: Uniform registers that may be read before they are written, see `sass_flow.py`.
    """

    registers: int
    spilled: int
    shared: int
    exact: Step
    pooled: Step | None
    uninitialised: tuple[str, ...] = ()

    @property
    def instructions(self) -> list[int]:
        """Of a step of each kind."""
        return [x.instructions for x in (self.exact, self.pooled) if x is not None]

    def faults(self, case: Case) -> list[str]:
        """What is wrong with it."""
        limit = TARGETS[case.target][2]
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled}")
        for name, step in (("exact", self.exact), ("pooled", self.pooled)):
            if step is None:
                continue
            if not step.tensor:
                found.append(f"no tensor core in the {name} step")
            others = (
                0 if step is self.exact else 3 if case.flags["MASK"] else 1
            )  # of a cell's facts
            if step.wide == 0 or step.wide + others < step.loads:
                found.append(f"{step.wide} of {step.loads} loads of the {name} step are wide")
        found += self.uninitialised
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, more than {limit}")
        return found


def compiled(case: Case) -> Built:
    """Compile the attention kernel and read its code."""
    constants = {
        "D": case.head_dim,
        **dict(zip(("D0", "D1"), case.config.channels(case.head_dim), strict=True)),
        "BLOCK_M": case.config.block_m,
        "BLOCK_N": case.config.block_n,
        **case.flags,
        "AHEAD": case.flags["MASK"] == 0 or case.config.masked_ahead,
    }
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.attend.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in TENSORS or name in POINTERS:
            signature[name] = "*" + POINTERS.get(name, case.dtype)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = ASTSource(kernel.attend, signature, constants, attributes)
    amd = case.target.startswith("gfx")
    target = (
        GPUTarget("hip", case.target, 64) if amd else GPUTarget("cuda", int(case.target[3:]), 32)
    )
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages}
    built = triton.compile(source, target=target, options=options)
    return _amd(built, case) if amd else _nvidia(built, case)


def spilled_by_lay(target: str, block_n: int) -> int:
    """Bytes of stack that the kernel has which writes tables of chosen blocks."""
    constants = {"BLOCK_N": block_n, "CHUNK": CHUNK, "INTERVALS": True}
    kinds = {"Bits": "*u8", "Cost": "*fp64", "Pairs": "*i64"}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*i32")
        for name in lay.lay.arg_names
    } | dict.fromkeys(lay.INTEGERS, "i32")
    source, options = ASTSource(lay.lay, signature, constants, {}), {"num_warps": WARPS}
    if target.startswith("gfx"):
        built = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
        return int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", built.asm["amdgcn"])[1])
    built = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        return int(re.search(r"STACK:(\d+)", said("cuobjdump", "-res-usage", file.name))[1])


def _nvidia(built, case: Case) -> Built:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = said("cuobjdump", "-res-usage", file.name)
        code = said("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    wide = WIDE if case.head_dim in (64, 128) else rf"{WIDE}|LDGSTS\S*\.64"
    return Built(
        registers,
        stack + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        built.metadata.shared,
        *_steps(instructions(code), case, r"LDGSTS", wide),
        tuple(uninitialised(code)),
    )


def said(tool: str, *arguments: str) -> str:
    done = subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def count(body: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, line)) for line in body)


def instructions(code: str) -> list[str]:
    """Instructions and labels (`.L_x_1:`) of SASS, in order."""
    found = []
    for line in code.splitlines():
        label = re.match(r"^(\.L_\w+):", line)
        text = re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*)", line)
        if label or text:
            found.append(label[0] if label else text[1])
    return found


def _steps(lines: list[str], case: Case, loads: str, wide: str) -> tuple[Step, Step | None]:
    """The steps that all rows see, and those of pooled keys: the first and the last loop."""
    tensor = TARGETS[case.target][1]
    bodies = hot_loops(lines, tensor)
    found = [
        Step(len(body), *(count(body, what) for what in (tensor, loads, wide)))
        for body in (bodies[0], bodies[-1])
    ]
    return found[0], found[1] if case.flags["HAS_FAR"] else None


def hot_loops(lines: list[str], tensor: str) -> list[list[str]]:
    """The bodies of loops with tensor-core instructions and no such loop inside them, in order.

    What begins in a loop and ends behind it is none, but a wait that is tried again out of line.
    """
    label = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for i, line in enumerate(lines):
        to = re.match(r"(?:BRA|s_cbranch)\S*\s.*?(\.?L\w+)", line)
        if to and label.get(to[1], i) < i:
            body = [x for x in lines[label[to[1]] : i + 1] if not x.endswith(":")]
            if count(body, tensor):
                loops.append((label[to[1]], i, body))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] < a[1] for b in loops)]
    inner = [a for a in inner if not any(b[0] < a[0] <= b[1] < a[1] for b in loops)]
    return [body for _, _, body in sorted(inner)] or [[]]


def _amd(built, case: Case) -> Built:
    code = built.asm["amdgcn"]
    number = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", code)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    lines = [re.split(r"\s*;", line)[0].strip() for line in code.splitlines()]
    lines = [x for x in lines if re.match(r"\.?L\w+:$", x) or re.match(r"[a-z]\w+(\s|$)", x)]
    narrow = "" if case.head_dim in (64, 128) else "|dwordx2"
    return Built(
        number["vgpr_count"],
        number["vgpr_spill_count"] + number["private_segment_fixed_size"],
        built.metadata.shared,
        *_steps(
            lines,
            case,
            r"(buffer|global)_load_(dwordx4|dwordx2|ushort|short|b128)",
            rf"(buffer|global)_load_(dwordx4|b128{narrow})",
        ),
    )


def tested() -> Iterator[Case]:
    """What the tests compile: every target, the extremes of the table."""
    for target, (name, *_) in TARGETS.items():
        yield Case(target, 64, configs_for(name, 64)[1])
        yield Case(target, 128, configs_for(name, 128)[0])
        yield Case(target, 128, configs_for(name, 128)[1], FAR)
        yield Case(target, 128, configs_for(name, 128)[1], FULL)


def every() -> Iterator[Case]:
    """All targets, head_dims, dtypes, configurations and cases."""
    switches = [
        dict(zip(PLAIN, on, strict=True))
        for on in itertools.product((0, 1, 2), (False, True), (False,))
    ]
    switches += [{**PARTIAL, "HAS_FAR": far} for far in (False, True)]
    for target, (name, *_) in TARGETS.items():
        for dim, dtype, flags in itertools.product((64, 80, 96, 128), ("bf16", "fp16"), switches):
            for config in dict.fromkeys(configs_for(name, dim)):
                yield Case(target, dim, config, flags, dtype)


def report(cases: Iterable[Any], compiled: Callable[[Any], Any], record: Path | None) -> int:
    """Compile cases, print what is found, write instructions to `record`; 1 if anything is wrong."""
    wrong, found = 0, {}
    for case in cases:
        built = compiled(case)
        faults = built.faults(case)
        wrong += bool(faults)
        found[str(case)] = built.instructions
        print(case, built, "; ".join(faults), sep=" | ", flush=True)
    if record is not None:
        recorded = {"triton": triton.__version__, "instructions": found}
        record.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{len(found)} kernels, {wrong} with faults")
    return int(wrong > 0)


def within_bars(case: Any, built: Any, record: Path) -> bool:
    """Whether a kernel has about as few instructions as recorded; of a record by another Triton, always."""
    recorded = json.loads(record.read_text())
    if recorded["triton"] != triton.__version__:
        return True
    bars = recorded["instructions"][str(case)]
    return all(n <= bar * 1.05 for n, bar in zip(built.instructions, bars, strict=True))


def main(arguments: list[str]) -> int:
    """Compile, print and record; 1 if anything is wrong."""
    wanted = [x for x in arguments if x != "--record"]
    recording = "--record" in arguments
    cases = (c for c in (tested() if recording else every()) if not wanted or c.target in wanted)
    return report(cases, compiled, RECORD if recording else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
