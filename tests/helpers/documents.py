"""Commands and Python that the documents show, as a person would copy them."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIRST_WORDS = ("sparse-dit", ".venv/bin/sparse-dit", ".venv/bin/pip", "pip", "make", "torchrun")
FIRST_WORDS += ("python", "python3", "pytest")
ELLIPSES = {"...", "…"}


@dataclass(frozen=True)
class Shown:
    """Something to type.

    Args:
        page: Where it is, from the repository's root.
        text: Its words, joined over lines, without comments; or the Python.
        whole: Whether it stands in a block of its own; in a sentence it may be shortened.
    """

    page: str
    text: str
    whole: bool

    @property
    def words(self) -> list[str]:
        """As a shell splits them."""
        return shlex.split(self.text.translate(str.maketrans("", "", "[]")))

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def pages() -> list[str]:
    """Every document for users, in the order in which it is read."""
    folders = ("docs", "profiles", "demos", "search")
    found = [file for name in folders for file in sorted((ROOT / name).rglob("*.md"))]
    return ["README.md", *(str(file.relative_to(ROOT)) for file in found)]


def commands(page: str) -> list[Shown]:
    """In blocks and in sentences."""
    text = prose(page)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [line for line in rest.split("\n") if line.startswith("    ")]
    found = []
    for block in ["\n".join(lines), *map(textwrap.dedent, blocks)]:
        for line in re.sub(r"\\\n\s*", " ", block).split("\n"):
            words = shlex.split(line, comments=True) if _typed(line) else []
            if words:
                found.append(Shown(page, shlex.join(words), whole=True))
    sentences = "\n".join(line for line in rest.split("\n") if not line.startswith("    "))
    for line in re.findall(r"`([^`]+)`", sentences):
        line = " ".join(line.split())
        if _typed(line):
            found.append(Shown(page, line, whole=False))
    return found


def snippets(page: str) -> list[Shown]:
    """Blocks of Python."""
    found = re.findall(r"^```python\n(.*?)^```", words_of(page), flags=re.M | re.S)
    return [Shown(page, text, whole=True) for text in found]


def _typed(line: str) -> bool:
    words = line.split()
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return len(words) > 1 and words[0] in FIRST_WORDS


def prose(page: str) -> str:
    """All but its Python and JSON."""
    return re.sub(r"^```(python|json).*?^```", "", words_of(page), flags=re.M | re.S)


def words_of(page: str) -> str:
    """All of it."""
    return (ROOT / page).read_text(encoding="utf-8")
