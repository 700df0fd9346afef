"""PTX text, as Triton writes it, taken apart: instructions, their operands, and where labels point."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);")
LABEL = re.compile(r"(\$?[\w$]+):")
ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


class Fault(Exception):
    """What a program must not do; the message names the check, and then the line."""


class Address(NamedTuple):
    """`[base + offset]`; the base is a register or the name of a parameter."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One line.

    Args:
        line: Its number in the text.
        text: As it stands there.
        guard: The predicate that it depends on, and whether on its opposite.
        opcode: With all its modifiers.
        operands: Registers and numbers, `{...}` as tuples, `[...]` as addresses.
    """

    line: int
    text: str
    guard: tuple[str, bool] | None
    opcode: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Program:
    """One kernel.

    Args:
        name: Of the entry.
        threads: In a block.
        parameters: Type of each, such as `u64`.
        instructions: In order.
        labels: The instruction that each label stands before.
    """

    name: str
    threads: int
    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parsed(text: str) -> Program:
    """The program of the only kernel in `text`.

    Raises:
        Fault: If a line is no instruction.
    """
    lines = text.splitlines()
    start, end = lines.index("{"), lines.index("}")
    head = "\n".join(lines[:start])
    instructions, labels = [], {}
    for number in range(start + 1, end):
        line = lines[number].split("//")[0].strip()
        label = LABEL.fullmatch(line)
        if label:
            labels[label[1]] = len(instructions)
        elif line and not line.startswith("."):
            instructions.append(_instruction(number + 1, line))
    return Program(
        re.search(r"\.entry (\w+)", head)[1],
        int(re.search(r"\.reqntid (\d+)", head)[1]),
        tuple(re.findall(r"\.param \.(\w+)", head)),
        tuple(instructions),
        labels,
    )


def _instruction(number: int, line: str) -> Instruction:
    match = INSTRUCTION.fullmatch(line)
    if match is None:
        raise Fault(f"not an instruction: line {number}: {line}")
    guard = (match[2], match[1] == "!") if match[2] else None
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[4])
    return Instruction(number, line, guard, match[3], tuple(map(_operand, parts)))


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(x.strip() for x in text[1:-1].split(","))
    address = ADDRESS.fullmatch(text)
    if address:
        return Address(address[1], int(address[2] or "0", 0))
    return text
