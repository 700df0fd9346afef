"""Prompts for a diffusion language model: beginnings of texts, and hidden pass keys that are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

ASKED = "Question: What is the pass key? Answer:"
LEAST_TOKENS = 64  # of a text around a pass key


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is written after.

    Args:
        name: What it is, in words.
        ids: int64 `[1, N]`.
        answer: What a right answer has in it; None for text that goes on.
    """

    name: str
    ids: Tensor
    answer: str | None = None


def begun(tokenizer: Any, name: str, text: str, tokens: int) -> Prompt:
    """The first tokens of a text.

    Raises:
        ValueError: If it has fewer.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) < tokens:
        raise ValueError(f"the text {name} must have at least {tokens} tokens, got {len(ids)}")
    return Prompt(name, torch.tensor([ids[:tokens]]))


def hidden(
    tokenizer: Any, name: str, text: str, tokens: int, depths: Sequence[float], seed: int = 0
) -> list[Prompt]:
    """Questions for a number of five digits that is hidden in a text, one for each depth.

    Args:
        tokenizer: The tokenizer of the model that is asked.
        name: The text's name.
        text: What the number is hidden in, after one of its full stops.
        tokens: Most tokens of a whole prompt.
        depths: Where the number lies, as shares of the text.
        seed: The seed by which numbers are drawn.

    Raises:
        ValueError: If the text is too short, or there is no room for one.
    """

    def ids(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    draw, found, question = Random(seed), [], ids(ASKED)
    sentences = text.replace(".\n", ". ").split(". ")
    for depth in depths:
        key = str(draw.randrange(10**4, 10**5))
        needle = ids(f"The pass key is {key}. Remember it.")
        parts, room = [], tokens - len(question) - len(needle)
        if room < LEAST_TOKENS:
            raise ValueError(f"a prompt must have at least {tokens - room + LEAST_TOKENS} tokens")
        for sentence in sentences:
            part = ids(sentence if sentence.endswith(".") else f"{sentence}.")
            if len(part) > room:
                break
            parts.append(part)
            room -= len(part)
        else:
            raise ValueError(f"the text {name} is too short to hide a pass key in {tokens} tokens")
        parts.insert(round(depth * len(parts)), needle)
        prompt = torch.tensor([[*itertools.chain(*parts), *question]])
        found.append(Prompt(f"{name}, pass key at {depth:.0%}", prompt, key))
    return found
