"""Random changes of PTX, one instruction each, that a check should notice."""

from __future__ import annotations

import random
import re

INSTEAD = [
    ("add.f32", "sub.f32"), ("sub.f32", "add.f32"), ("mul.f32", "add.f32"), ("max.f32", "min.f32"),
    ("add.s32", "sub.s32"), ("add.s64", "sub.s64"), ("mul.lo", "add"), ("and.pred", "or.pred"),
    ("xor.b32", "or.b32"), ("and.b32", "or.b32"), ("shl.b32", "shr.u32"),
    ("shr.u32", "shl.b32"), ("setp.lt", "setp.le"), ("setp.le", "setp.lt"), ("setp.gt", "setp.ge"),
    ("setp.ne", "setp.eq"), ("setp.eq", "setp.ne"), (".trans", ""), ("fma.rn", "mul"),
    ("bfly", "idx"),
]  # fmt: skip
ORDERED = r"(sub|div|fma|selp|setp|shl|shr|mma|cvt\.rn\.(bf16x2|f16x2)|st)\b"
ATTEMPTS = 1000


def mutant(text: str, lines: tuple[int, ...], seed: int) -> tuple[str, str, str]:
    """Other PTX with one of its `lines` (from 1 on) changed; the kind of change, and what stands there."""
    chance = random.Random(seed)
    whole = text.splitlines()
    for _ in range(ATTEMPTS):
        number = chance.choice(lines) - 1
        before = whole[number].split("//")[0].rstrip()
        changes = {kind: change(before, chance) for kind, change in KINDS.items()}
        possible = [kind for kind, after in changes.items() if after not in (None, before)]
        if possible:
            kind = chance.choice(possible)
            whole[number] = after = changes[kind]
            return "\n".join(whole), kind, f"{number + 1}: {before.strip()} -> {after.strip()}"
    raise ValueError(f"no change found in {ATTEMPTS} attempts")


def _opcode(line: str, chance: random.Random) -> str | None:
    possible = [(a, b) for a, b in INSTEAD if a in line]
    if not possible:
        return None
    old, new = chance.choice(possible)
    if old == "mul.lo":
        new = "add"
    if old == "fma.rn":
        return re.sub(r"fma\.rn(\.ftz)?(.*), [^,]+;", r"mul\2;", line)
    return line.replace(old, new, 1)


def _number(line: str, chance: random.Random) -> str | None:
    """One number among the operands is 1 more, or twice itself, or an address is 4 to 16 bytes off."""
    found = list(re.finditer(r"(?<=[ +])-?\d+(?=[ ,\];])", line))
    if not found:
        return None
    match = chance.choice(found)
    number = int(match[0])
    new = (
        number + chance.choice((4, 16)) if "[" in line else chance.choice((number + 1, 2 * number))
    )
    return line[: match.start()] + str(new) + line[match.end() :]


def _operands(line: str, chance: random.Random) -> str | None:
    """Two registers that are read, of the same kind, change places."""
    if not re.match(rf"\s*(@!?%p\d+ )?{ORDERED}", line):
        return None
    opcode, first, rest = re.match(r"(\s*(?:@!?%p\d+ )?[\w.:]+)(\s+[^,]*,)(.*)", line).groups()
    if opcode.strip().startswith("mma"):
        opcode, first, rest = re.match(r"(\s*[\w.:]+)(\s*\{[^}]*\},)(.*)", line).groups()
    found = list(re.finditer(r"%(r|rd|rs|p)\d+", rest))
    if "fma" in opcode:
        found = found[1:]  # the others may change places
    pairs = [
        (a, b) for i, a in enumerate(found) for b in found[i + 1 :]
        if a[1] == b[1] and a[0] != b[0]
    ]  # fmt: skip
    if not pairs:
        return None
    a, b = chance.choice(pairs)
    swapped = rest[: a.start()] + b[0] + rest[a.end() : b.start()] + a[0] + rest[b.end() :]
    return opcode + first + swapped


def _guard(line: str, chance: random.Random) -> str | None:
    match = re.match(r"(\s*)@(!?)(%p\d+)(.*)", line)
    if match is None:
        return None
    space, negated, name, rest = match.groups()
    return space + chance.choice((rest, f"@{'' if negated else '!'}{name}{rest}"))


def _deleted(line: str, chance: random.Random) -> str | None:
    """Barriers, groups of copies, stores."""
    return "" if re.search(r"\b(bar\.|cp\.async|st\.|atom)", line) else None


def _weaker_wait(line: str, chance: random.Random) -> str | None:
    if "wait_group" not in line:
        return None
    return re.sub(r"(\d+);", lambda match: f"{int(match[1]) + 1};", line)


KINDS = {
    "opcode": _opcode,
    "number": _number,
    "operands": _operands,
    "guard": _guard,
    "deleted": _deleted,
    "weaker wait": _weaker_wait,
}
