"""Thirteen kinds of question about a long text of any length: the kinds of RULER, with texts of our own.

RULER: https://arxiv.org/abs/2404.06654. Its numbers can't be compared with these: words, texts and the
scoring differ.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from ...search.language.reading import passkeys
from .haystack import CITIES, TRADES, coined, noise, person, prose, words

LEAST_UNITS = 8  # sentences of a text: with less there is nothing to leave out
HOPS = 5  # variables of a chain
COMMON = 10  # words that come in every round of a list
Made = tuple[Iterator[str], list[str], str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Question:
    """A text with a question at its end, and what must follow.

    Args:
        kind: One of `KINDS`, or "passkey".
        prompt: int64 `[1, N]`.
        answer: int64 `[A]`: the tokens of a right answer.
        answers: The parts of it that are looked for in what is said.
        depth: Where the answer lies, as a share of the text; None if it has no one place.
    """

    kind: str
    prompt: Tensor
    answer: Tensor
    answers: tuple[str, ...]
    depth: float | None = None


def _word(draw: Random) -> str:
    return f"{draw.choice(words())}-{draw.choice(words())}"


def _number(draw: Random) -> str:
    return str(draw.randrange(10**6, 10**7))


def _long(draw: Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _fact(key: str, value: str) -> str:
    return f"The secret code of {key} is {value}."


def _asked(keys: list[str]) -> str:
    """The beginning of the sentence that the answer ends."""
    if len(keys) == 1:
        return f"What is the secret code of {keys[0]}? The secret code of {keys[0]} is"
    listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
    return f"What are the secret codes of {listed}? In this order, the secret codes are"


def _facts(draw: Random, value: Callable[[Random], str]) -> Iterator[str]:
    while True:
        yield _fact(_word(draw), value(draw))


def _needles(
    draw: Random,
    fill: Iterator[str],
    value: Callable[[Random], str] = _number,
    keys: int = 1,
    asked: int = 1,
    values: int = 1,
) -> Made:
    """Facts in a text: `asked` of `keys` keys with `values` values each are asked for."""
    names = [_word(draw) for _ in range(keys)]
    held = {name: [value(draw) for _ in range(values)] for name in names}
    facts = [_fact(name, v) for name, found in held.items() for v in found]
    draw.shuffle(facts)
    answers = tuple(v for name in names[:asked] for v in held[name])
    if values == 1:
        return fill, facts, _asked(names[:asked]), answers
    said = f"What are all secret codes of {names[0]}? In the order of the text, they are"
    return fill, facts, said, tuple(sorted(answers, key=lambda v: facts.index(_fact(names[0], v))))


def _variables(draw: Random) -> Made:
    """A chain of variables, each set to the one before; all that have the first one's value are asked for."""
    chains = [[coined(draw).upper() for _ in range(HOPS)] for _ in range(2)]
    values = [str(draw.randrange(10**4, 10**5)) for _ in chains]
    steps = [
        [f"Set {chain[0]} to {value}."]
        + [f"Set {b} to the value of {a}." for a, b in itertools.pairwise(chain)]
        for chain, value in zip(chains, values, strict=True)
    ]
    facts = [step for pair in zip(*steps, strict=True) for step in pair]
    question = f"Which variables have the value {values[0]}? These {HOPS} variables:"
    return noise(), facts, question, tuple(chains[0])


def _rounds(draw: Random, often: Sequence[tuple[str, int]], rest: Callable[[], list[str]]):
    """Words in shuffled rounds, without end; in each round some come a number of times."""
    while True:
        one = [word for word, times in often for _ in range(times)] + rest()
        draw.shuffle(one)
        yield from one


def _common(draw: Random) -> Made:
    """A list of words of which some come much more often than the others."""
    common = draw.sample(words(), COMMON)
    others = [word for word in words() if word not in common]
    fill = _rounds(draw, [(word, 1) for word in common], lambda: draw.sample(others, COMMON))
    question = f"Which {COMMON} words are the most common in the list? They are"
    return fill, [], question, tuple(common)


def _frequent(draw: Random) -> Made:
    """Made-up words whose frequencies fall as in a language; the three most frequent are asked for."""
    coded = [coined(draw) for _ in range(40)]
    often = list(zip(coded[:3], (12, 6, 4), strict=True))
    fill = _rounds(draw, often, lambda: draw.sample(coded[3:], 10))
    question = "Which three made-up words are the most frequent? They are"
    return fill, [], question, tuple(coded[:3])


def _people(draw: Random) -> Iterator[str]:
    while True:
        name, city, trade = person(draw), draw.choice(CITIES), draw.choice(TRADES)
        yield f"{name} is a {trade} who lives in {city}."


def _one_fact(draw: Random) -> Made:
    """Where a person lives, among others who live elsewhere."""
    name, city, trade = person(draw), draw.choice(CITIES), draw.choice(TRADES)
    question = f"Where does {name} live? {name} lives in"
    return _people(draw), [f"{name} is a {trade} who lives in {city}."], question, (city,)


def _two_facts(draw: Random) -> Made:
    """Where the friend of a person lives: who that is stands elsewhere."""
    name, friend, city = person(draw), person(draw), draw.choice(CITIES)
    facts = [
        f"The best friend of {name} is {friend}.",
        f"{friend} is a {draw.choice(TRADES)} who lives in {city}.",
    ]
    draw.shuffle(facts)
    question = f"Where does the best friend of {name} live? The best friend of {name} lives in"
    return _people(draw), facts, question, (city,)


KINDS: dict[str, Callable[[Random], Made]] = {
    "needle in noise": lambda draw: _needles(draw, noise()),
    "needle in prose": lambda draw: _needles(draw, prose(draw)),
    "long needle": lambda draw: _needles(draw, prose(draw), _long),
    "one key of four": lambda draw: _needles(draw, prose(draw), keys=4),
    "one key of many": lambda draw: _needles(draw, _facts(draw, _number)),
    "one long key of many": lambda draw: _needles(draw, _facts(draw, _long), _long),
    "four values": lambda draw: _needles(draw, prose(draw), values=4),
    "four keys": lambda draw: _needles(draw, prose(draw), keys=4, asked=4),
    "variables": _variables,
    "common words": _common,
    "frequent words": _frequent,
    "one fact": _one_fact,
    "two facts": _two_facts,
}


def question(kind: str, tokenizer: Any, tokens: int, seed: int) -> Question:
    """A question of a kind over a text of about `tokens` tokens, the same for the same seed.

    Args:
        kind: One of `KINDS`.
        tokenizer: The tokenizer of the model that is asked.
        tokens: Tokens of text and question together, at most but for a few.
        seed: The seed of what is drawn.

    Raises:
        ValueError: If there is no room for a text.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    draw = Random(f"{kind} {seed}")
    fill, facts, asked, answers = KINDS[kind](draw)
    room = tokens - sum(count(f" {fact}") for fact in facts) - count(f"\n{asked}")
    units: list[str] = []
    while (room := room - count(f" {(unit := next(fill))}")) >= 0:
        units.append(unit)
    if len(units) < LEAST_UNITS:
        raise ValueError(
            f"a question of the kind {kind!r} needs a text of more than {tokens} tokens; give greater lengths"
        )
    places = sorted(draw.randrange(len(units) + 1) for _ in facts)
    for fact, place in reversed([*zip(facts, places, strict=True)]):
        units.insert(place, fact)
    prompt = tokenizer(f"{' '.join(units)}\n{asked}", return_tensors="pt").input_ids
    answer = tokenizer(f" {', '.join(answers)}", add_special_tokens=False).input_ids
    depth = places[0] / len(units) if len(facts) == 1 else None
    return Question(kind, prompt, torch.tensor(answer), answers, depth)


def passkey_questions(
    tokenizer: Any, tokens: int, depths: Sequence[float], seed: int = 0
) -> list[Question]:
    """The search's questions for a hidden number, one for each depth."""
    found = []
    for key in passkeys(tokenizer, tokens, depths, seed):
        prompt, answer = key.ids[:, : -key.answer], key.ids[0, -key.answer :]
        number = tokenizer.decode(answer).strip()
        found.append(Question("passkey", prompt, answer, (number,), key.depth))
    return found
