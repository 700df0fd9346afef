"""What a language model says of a text that it reads, at some places, and how long that takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...modalities import MODALITIES, Modalities
from ...nan_guard import refuse_nan
from ...timing import Taken, Timer

LEAST_TOKENS = 256  # of a text: below there is nothing to leave out
POSITIONS = 512  # at which what is said is compared: a whole text's would take gigabytes
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
START = "There is important information hidden in a lot of text. Find it and memorize it. "
QUESTION = " What is the pass key? The pass key is"


@dataclass(frozen=True, eq=False)
class Text:
    """A text of N tokens, and P places in it at which the next token is predicted.

    Args:
        ids: int64 `[1, N]`.
        positions: int64 `[P]`, rising, below N - 1.
        others: What the model takes beside the ids: pixels, grids, ...
        modalities: Where images and videos lie among the tokens; None for text alone.
    """

    ids: Tensor
    positions: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    modalities: Modalities | None = None

    @staticmethod
    def of(ids: Tensor, positions: int = POSITIONS) -> Text:
        """A text with places spread evenly over its second half, where attention has something to leave out.

        Args:
            ids: int64 `[N]` or `[1, N]`, at least 4 tokens.
            positions: How many places at most.
        """
        ids = ids.reshape(1, -1)
        last = ids.shape[1] - 2
        return Text(
            ids, torch.linspace(last // 2, last, min(positions, last // 2 + 1)).long().unique()
        )

    @staticmethod
    def cut(ids: Tensor, tokens: int, what: str = "got") -> Text:
        """The first tokens of a text.

        Args:
            ids: int64 `[N]` or `[1, N]`.
            tokens: How many at most.
            what: Who has too few, for the message.

        Raises:
            ValueError: If there are too few.
        """
        ids = ids.reshape(1, -1)[:, :tokens]
        if ids.shape[1] < LEAST_TOKENS:
            raise ValueError(
                f"a text must have at least {LEAST_TOKENS} tokens, {what} {ids.shape[1]}"
            )
        return Text.of(ids)

    @staticmethod
    def of_prompt(inputs: Mapping[str, Tensor], modalities: Modalities) -> Text:
        """A prompt with images or videos; compared is what is said of the text after the first of them.

        Args:
            inputs: What a processor makes of one prompt, its answer included if there is one.
            modalities: Where images and videos lie in it.

        Raises:
            ValueError: If there is no text after an image or a video.
        """
        ids, first = inputs["input_ids"], modalities.media[0].start
        text = modalities.kinds()[1:] == MODALITIES.index("text")
        places = (text & (torch.arange(len(text)) >= first)).nonzero()[:, 0]
        if not len(places):
            raise ValueError(
                "a prompt needs text after its image or video, to compare what is said of it"
            )
        places = places[torch.linspace(0, len(places) - 1, min(POSITIONS, len(places))).long()]
        others = {
            name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")
        }
        return Text(ids, places, others, modalities)

    def inputs_on(self, device: torch.device) -> dict[str, Tensor]:
        """The model's arguments."""
        return {name: x.to(device) for name, x in {"input_ids": self.ids, **self.others}.items()}

    @property
    def targets(self) -> Tensor:
        """The tokens that follow the places, int64 `[P]`."""
        return self.ids[0, self.positions + 1]


@dataclass(frozen=True, eq=False)
class Read:
    """What a model said of a text.

    Args:
        log_probs: float32 `[P, V]` on the CPU, of each place's next token.
        taken: How long the forward took.
    """

    log_probs: Tensor
    taken: Taken

    def loss(self, text: Text) -> float:
        """Mean negative log-likelihood of the text's own next tokens, in nats."""
        return -self.log_probs.gather(1, text.targets[:, None]).mean().item()

    def divergence(self, dense: Read) -> float:
        """Mean KL divergence from what was said with dense attention, in nats a token."""
        told = dense.log_probs
        return (told.exp() * (told - self.log_probs)).sum(1).mean().item()

    def agreement(self, dense: Read) -> float:
        """Share of the places whose most likely next token is that of dense attention."""
        same = self.log_probs.argmax(1) == dense.log_probs.argmax(1)
        return same.float().mean().item()

    def perplexity_increase(self, dense: Read, text: Text) -> float:
        """Relative increase of perplexity over that with dense attention; 0.03 is 3 %."""
        return math.exp(self.loss(text) - dense.loss(text)) - 1


@torch.no_grad()
def read(model: Any, text: Text) -> Read:
    """Run one prefill of a text.

    Raises:
        ValueError: If the model says NaN of a token.
    """
    device = model.device
    timer = Timer(device)
    places = text.positions.to(device)
    logits = model(**text.inputs_on(device), logits_to_keep=places).logits[0]
    taken = timer.stop()
    refuse_nan(model, logits)
    return Read(logits.float().log_softmax(-1).cpu(), taken)


@dataclass(frozen=True, eq=False)
class Passkey:
    """A number hidden in a lot of text, and the question for it.

    Args:
        ids: int64 `[1, N]`: the text, the question and the answer.
        answer: How many tokens the answer has.
        depth: Where the number lies, as a share of the text.
    """

    ids: Tensor
    answer: int
    depth: float


def passkeys(tokenizer: Any, tokens: int, depths: Sequence[float], seed: int = 0) -> list[Passkey]:
    """Questions for a hidden number of five digits, one for each depth; the same for the same seed.

    The test of Landmark Attention (https://arxiv.org/abs/2305.16300) in about `tokens` tokens.

    Raises:
        ValueError: If there is no room for a text.
    """

    def ids(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    drawn = torch.Generator().manual_seed(seed)
    filler, start, question = ids(FILLER), ids(START), ids(QUESTION)
    found = []
    for depth in depths:
        key = "".join(map(str, torch.randint(0, 10, (5,), generator=drawn).tolist()))
        needle = ids(f" The pass key is {key}. Remember it. {key} is the pass key. ")
        answer = ids(f" {key}")
        room = tokens - len(start) - len(needle) - len(question) - len(answer)
        if room < len(filler):
            raise ValueError(
                f"a passkey needs a text of at least {tokens - room + len(filler)} tokens, got {tokens}"
            )
        text = (filler * (room // len(filler) + 1))[:room]
        cut = int(room * depth) // len(filler) * len(filler)
        parts = start + text[:cut] + needle + text[cut:] + question + answer
        found.append(Passkey(torch.tensor([parts]), len(answer), depth))
    return found


@torch.no_grad()
def finds(model: Any, passkey: Passkey) -> bool:
    """Whether each token of the answer is what the model holds most likely, given those before it."""
    logits = model(
        input_ids=passkey.ids.to(model.device), logits_to_keep=passkey.answer + 1
    ).logits[0, :-1]
    return bool((logits.argmax(-1).cpu() == passkey.ids[0, -passkey.answer :]).all())
