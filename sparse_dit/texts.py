"""Text that people write: UTF-8 with or without a byte order mark, lines as editors end them."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

BOM = "\ufeff"
MAX_BYTES = 256 << 20
MAX_PROMPT = 1 << 16  # characters; a plan's file holds no longer text
# beside tabs and ends of lines: what a plan's file may not hold, and line ends that no editor makes
_UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_NAMES = {"\0": "NULL", "\x0c": "FORM FEED", "\x85": "NEXT LINE", BOM: "BYTE ORDER MARK"}


def decoded(data: bytes) -> str:
    """The text of UTF-8 bytes, without a byte order mark.

    Raises:
        ValueError: If they aren't UTF-8; says in which line and what the file seems to be.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("not a text file (UTF-8) but UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = len(re.findall(rb"\r\n|\r|\n", before)) + 1
        raise ValueError(
            f"not a text file (UTF-8): byte {error.start} (0x{data[error.start]:02x}), in line {line}, "
            "is not text; save it as UTF-8"
        ) from None


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a file of at most `limit` bytes; see `decoded`.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is no file, larger, or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file" if path.exists() else f"{path} doesn't exist")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is larger than {limit >> 10} KiB")
    try:
        return decoded(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def lines_of(text: str) -> list[str]:
    """Lines as editors end them (LF, CR LF or CR), without marks where files were put together."""
    return [line.removeprefix(BOM) for line in re.split(r"\r\n|\r|\n", text)]


def unfit(text: str) -> str | None:
    """Why a prompt can't be used; None if it can."""
    if len(text) > MAX_PROMPT:
        return f"must have at most {MAX_PROMPT:,} characters, got {len(text):,}"
    if found := _UNFIT.search(text):
        character = found[0]
        name = _NAMES.get(character) or unicodedata.name(character, "CONTROL CHARACTER")
        return (
            f"must be text without control characters, got U+{ord(character):04X} ({name}) "
            f"as character {found.start() + 1}; remove it"
        )
    return None
