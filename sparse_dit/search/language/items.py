"""What patterns are scored on: texts, prompts with images or videos, and questions for what is hidden.

Letters in shapes: N tokens, R sampled rows, P places.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...modalities import MODALITIES, Modality
from .reading import Passkey, Text

PLACES = 512  # of a text at which tokens are drawn
ASKING = 32  # last rows of a question, which ask and answer


@dataclass(frozen=True, eq=False)
class Item:
    """What patterns are scored on.

    Args:
        text: What the model reads.
        rows: int64 `[R]`, the rows whose outputs are computed.
        weights: float32 `[R]`, how many rows each stands for.
        places: int64 `[P]`, where tokens are drawn.
        share: The item's share of the loss of all.
        of: Numbers of the rows of each modality that the text has, int64.
    """

    text: Text
    rows: Tensor
    weights: Tensor
    places: Tensor
    share: float
    of: dict[Modality, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.of:
            self.of["text"] = torch.arange(len(self.rows))

    @staticmethod
    def of_text(text: Text, rows: int, seed: int, share: float) -> Item:
        """A text, or a prompt with images or videos, of which everything counts that is compared.

        Args:
            text: The text.
            rows: How many rows are sampled, of each modality.
            seed: The seed by which rows are drawn.
            share: See above.
        """
        tokens = text.ids.shape[1]
        if text.modalities is None:
            picked = sampled_rows(tokens, rows, seed)
            weights = torch.full((len(picked),), tokens / len(picked))
            return Item(text, picked, weights, sampled_rows(tokens, PLACES, seed + 1), share)
        kinds, found, weights, of, count = text.modalities.kinds(), [], [], {}, 0
        for number, name in enumerate(MODALITIES):
            all_rows = (kinds == number).nonzero()[:, 0]
            if len(all_rows):
                picked = all_rows[sampled_rows(len(all_rows), rows, seed)]
                found.append(picked)
                weights.append(torch.full((len(picked),), len(all_rows) / len(picked)))
                of[name] = torch.arange(count, count + len(picked))
                count += len(picked)
        return Item(text, torch.cat(found), torch.cat(weights), text.positions, share, of)

    @staticmethod
    def of_passkey(passkey: Passkey, rows: int, seed: int, share: float) -> Item:
        """A question, of which the answer counts; the rows that ask and answer are all sampled."""
        tokens = passkey.ids.shape[1]
        before = tokens - min(ASKING, tokens // 2)
        picked = sampled_rows(before, rows, seed)
        weights = torch.full((len(picked),), before / len(picked))
        last = torch.arange(before, tokens)
        places = torch.arange(tokens - passkey.answer - 1, tokens - 1)
        rows_, weights = torch.cat([picked, last]), torch.cat([weights, torch.ones(len(last))])
        return Item(Text(passkey.ids, places), rows_, weights, places, share)


def sampled_rows(tokens: int, rows: int, seed: int) -> Tensor:
    """Row numbers, one at random from each of `rows` equal parts, int64 `[R]`; all if there are no more."""
    if tokens <= rows:
        return torch.arange(tokens)
    drawn = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((torch.arange(rows) + drawn) * tokens / rows).long()
