"""Measuring problems: a text of an exact length, a question behind it, and the answer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from random import Random

from demos.tiny_dlm.lessons import fill_text, found_for
from demos.tiny_dlm.questions import fact, pass_key_of
from demos.tiny_dlm.tokens import build_tokenizer

CANVAS = 16  # tokens for an answer
DECOYS = 3  # pass keys of others in the same text


@dataclass(frozen=True)
class Problem:
    """The token numbers of a prompt that ends where the answer begins, and the answer."""

    tokens: list[int]
    answer: str

    @property
    def prompt(self) -> str:
        """The prompt as text; it may begin within a sentence."""
        return build_tokenizer().decode(self.tokens).removeprefix(" ")


def draw_text(tokens: int, random: Random) -> list[int]:
    """Token numbers of a text of exactly that many tokens."""
    return [*chain(*fill_text(tokens, found_for(tokens, random), random))]


def draw_problem(tokens: int, kind: str, depth: float, random: Random) -> Problem:
    """A problem whose prompt and canvas have exactly that many tokens, at least 192.

    Args:
        tokens: Tokens of the prompt and the canvas of `CANVAS` tokens.
        kind: `"key"`, one of four people's pass keys, or `"fact"`, something about one of the people.
        depth: Where the answer is hidden, from 0, the start, to 1, just before the question.
        random: Where the text and the question are drawn from.

    Raises:
        ValueError: If `tokens` is too small or `kind` unknown.
    """
    if tokens < 192:
        raise ValueError(f"a problem has at least 192 tokens, got {tokens}; ask for a longer one")
    if kind not in ("key", "fact"):
        raise ValueError(f"kind must be 'key' or 'fact', got {kind!r}")
    encode = build_tokenizer()
    village = found_for(tokens, random)
    names = random.sample(
        [who.name for who in village.people], min(DECOYS, len(village.people) - 1) + 1
    )
    keys = [pass_key_of(name, random) for name in names]
    question = keys[0] if kind == "key" else fact(village, random)
    asked = encode(question.prompt).input_ids
    others = keys[1:]
    hidden = [encode(other.hidden).input_ids for other in others]
    answer = encode(question.hidden).input_ids
    left = tokens - CANVAS - len(asked) - len(answer) - sum(map(len, hidden))
    text = fill_text(left, village, random)
    for one in hidden:
        text.insert(random.randint(1, len(text)), one)
    text.insert(1 + round(depth * (len(text) - 1)), answer)
    return Problem([*chain(*text), *asked], question.answer)
