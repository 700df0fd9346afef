"""Measuring problems: a text of an exact length, a question behind it, and the answer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from random import Random

from demos.tiny_dlm.lessons import encode, fill_text, found_for
from demos.tiny_dlm.questions import fact, pass_key, pass_key_of
from demos.tiny_dlm.tokens import build_tokenizer

CANVAS = 16  # tokens for an answer
KINDS = ("key", "named", "fact")


@dataclass(frozen=True)
class Problem:
    """The token numbers of a prompt that ends where the answer begins, and the answer."""

    tokens: list[int]
    answer: str

    @property
    def prompt(self) -> str:
        """The prompt as text; it may begin within a sentence."""
        return str(build_tokenizer().decode(self.tokens)).removeprefix(" ")


def draw_text(tokens: int, random: Random) -> list[int]:
    """Token numbers of a text of exactly that many tokens."""
    return [*chain(*fill_text(tokens, found_for(tokens, random), random))]


def draw_problem(tokens: int, kind: str, depth: float, random: Random) -> Problem:
    """A problem whose prompt and canvas have exactly that many tokens, at least 192.

    Args:
        tokens: Tokens of the prompt and the canvas of `CANVAS` tokens.
        kind: `"key"`, the one pass key of a text, `"named"`, one of three people's pass keys, or `"fact"`,
            something about one of the people.
        depth: Where the answer is hidden, from 0, the start, to 1, just before the question.
        random: Where the text and the question are drawn from.

    Raises:
        ValueError: If `tokens` is too small or `kind` unknown.
    """
    if tokens < 192:
        raise ValueError(f"a problem has at least 192 tokens, got {tokens}; ask for a longer one")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    village = found_for(tokens, random)
    names = random.sample([who.name for who in village.people], 3)
    if kind == "key":
        question, others = pass_key(random), []
    elif kind == "named":
        question, *others = [pass_key_of(name, random) for name in names]
    else:
        question, others = fact(village, random), []
    asked, answer = encode(question.prompt), encode(question.hidden)
    hidden = [encode(other.hidden) for other in others]
    text = fill_text(tokens - CANVAS - sum(map(len, (asked, answer, *hidden))), village, random)
    for one in hidden:
        text.insert(random.randint(1, len(text)), one)
    text.insert(1 + round(depth * (len(text) - 1)), answer)
    return Problem([*chain(*text), *asked], question.answer)
