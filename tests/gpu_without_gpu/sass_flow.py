"""Uniform registers in NVIDIA's machine code that may be read before anything is written to them.

That is a fault of the assembler, not of ours, and no test of PTX sees it: with head_dim 96 on sm_90, `ptxas`
of CUDA 12.9 made a descriptor of shared memory from a register that only another loop writes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAKERS = ("U", "R2UR", "S2UR", "CS2UR", "VOTEU", "REDUX", "LDCU")
WIDE = {".64": 2, ".WIDE": 2, ".128": 4}
OPERAND = re.compile(r"\b(?:(gdesc|desc)\[)?UR(\d+)\b")


class Instruction(NamedTuple):
    """Args:
    text: As disassembled, without its predicate.
    reads, writes: Numbers of uniform registers.
    to: Labels that it may jump to.
    goes_on: Whether the next instruction may follow.
    """

    text: str
    reads: frozenset[int]
    writes: frozenset[int]
    to: tuple[str, ...]
    goes_on: bool


def uninitialised(code: str) -> list[str]:
    """Instructions that read a uniform register which a path from the start doesn't write, and which.

    Args:
        code: What `nvdisasm -c` prints of a kernel.
    """
    lines, labels = _parsed(code)
    before: list[frozenset[int] | None] = [None] * len(lines)  # surely written before each
    open_places = [(0, frozenset[int]())]
    while open_places:
        place, written = open_places.pop()
        known = before[place]
        merged = written if known is None else known & written
        if merged == known:
            continue
        before[place] = merged
        line = lines[place]
        after = merged | line.writes
        if line.goes_on and place + 1 < len(lines):
            open_places.append((place + 1, after))
        open_places += [(labels[label], after) for label in line.to if label in labels]
    found = []
    for line, written in zip(lines, before, strict=True):
        if written is not None and (missing := line.reads - written):
            found.append(f"{line.text}: UR{min(missing)} may not be written")
    return found


def _parsed(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and at which of them labels stand."""
    lines: list[Instruction] = []
    labels: dict[str, int] = {}
    for row in code.splitlines():
        if label := re.match(r"^(\.L_\w+):", row):
            labels[label[1]] = len(lines)
        if text := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*);", row):
            lines.append(_instruction(text[2].strip(), text[1] is not None))
    return [_met(place, lines, labels) for place in range(len(lines))], labels


def _met(place: int, lines: list[Instruction], labels: dict[str, int]) -> Instruction:
    """Ways of a branch that meet (`BSYNC B0`) go on at the label said before (`BSSY B0`), the next one."""
    line = lines[place]
    if not line.text.startswith("BSYNC"):
        return line
    said = f"BSSY {line.text.split()[1]}, "
    found = [re.search(r"`\((\.L_\w+)\)", x.text) for x in lines if x.text.startswith(said)]
    behind = [label[1] for label in found if label and labels[label[1]] > place]
    return line._replace(to=tuple(sorted(behind, key=labels.__getitem__)[:1]), goes_on=not behind)


def _instruction(text: str, conditional: bool) -> Instruction:
    name, _, rest = text.partition(" ")
    operands = [x.strip() for x in rest.split(",")]
    while operands and re.fullmatch(r"!?U?P(T|\d)", operands[0]):
        operands.pop(0)
    writes: set[int] = set()
    makes = name.startswith(MAKERS) and "SETP" not in name
    if makes and operands and (target := re.fullmatch(r"UR(\d+)", operands[0])):
        count = max([1, *(n for mark, n in WIDE.items() if mark in name)])
        writes.update(range(int(target[1]), int(target[1]) + count))
        operands.pop(0)
    reads: set[int] = set()
    for kind, number in OPERAND.findall(", ".join(operands)):
        reads.update(int(number) + place for place in _span(kind, name, operands))
    jump = re.search(r"`\((\.L_\w+)\)", rest) if name.startswith(("BRA", "CALL")) else None
    ends = (
        name.startswith(("EXIT", "BRA", "RET"))
        and not conditional
        and "UP" not in rest.split("`")[0]
    )
    to = (jump[1],) if jump else ()
    return Instruction(text, frozenset(reads), frozenset(writes), to, not ends)


def _span(kind: str, name: str, operands: list[str]) -> range:
    """Which registers from the named one on are read."""
    if kind == "gdesc" and name.startswith("HGMMA"):
        # descriptors of both operands, two registers each; the first is unused if it lies in registers
        return range(0 if operands[1].startswith("gdesc") else 2, 4)
    return range(2 if kind == "desc" else 1)
