"""The questions, their answers as words, and the tokenizer that has one token for each word."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demos.tiny_vlm.clips import COLOURS, MOTIONS, SHAPES, Clips

MOST_PICTURES = 128
END = "end"  # what comes after the last picture
_SPECIAL = ("<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_SIGNS = ("?", ":", "colours", "shapes", "motions", "frames", "yes", "no")


def _of_framed(values: Tensor, clips: Clips) -> Tensor:
    return values.gather(1, clips.framed[:, None])[:, 0]


def _next_colour(clips: Clips) -> Tensor:
    behind = torch.full_like(clips.colour[:, :1], len(COLOURS))
    return torch.cat([clips.colour, behind], 1).gather(1, clips.framed[:, None] + 1)[:, 0]


# question: the words that may answer it, and which of them is right for each clip, `[B]`
QUESTIONS: dict[str, tuple[tuple[str, ...], Callable[[Clips], Tensor]]] = {
    "colour": (tuple(COLOURS), lambda clips: _of_framed(clips.colour, clips)),
    "shape": (SHAPES, lambda clips: _of_framed(clips.shape, clips)),
    "motion": (tuple(MOTIONS), lambda clips: _of_framed(clips.motion, clips)),
    "next": ((*COLOURS, END), _next_colour),
    "number": (tuple(map(str, range(MOST_PICTURES))), lambda clips: clips.framed),
}
# list: the words in it, and which of them stands for each picture, `[B, T]`
LISTS: dict[str, tuple[tuple[str, ...], Callable[[Clips], Tensor]]] = {
    "colours": (tuple(COLOURS), lambda clips: clips.colour),
    "shapes": (SHAPES, lambda clips: clips.shape),
    "motions": (tuple(MOTIONS), lambda clips: clips.motion),
    "frames": (
        ("no", "yes"),
        lambda clips: (torch.arange(clips.colour.shape[1]) == clips.framed[:, None]).long(),
    ),
}


def words() -> list[str]:
    """Every token, in the order of their numbers."""
    answers = (word for known, _ in QUESTIONS.values() for word in known)
    return list(dict.fromkeys((*_SPECIAL, *_SIGNS, *QUESTIONS, *answers)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, words between spaces; an unknown word is an error."""
    vocabulary = {word: number for number, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def tokens(known: tuple[str, ...]) -> Tensor:
    """Token numbers of the words, `[len(known)]`."""
    every = words()
    return torch.tensor([every.index(word) for word in known])
