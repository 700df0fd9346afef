"""What a search for a language model is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...words import option
from .reading import LEAST_TOKENS, Text

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
Given = (
    str | Tensor | Mapping[str, Tensor]
)  # a text, its tokens, or what a VLM's processor makes of a prompt
DIALS = ("target_speedup", "max_kl", "max_ppl_increase")


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageOptions:
    """What is asked for, beside the model and its texts.

    Args:
        tokenizer: Turns texts into tokens and makes passkey questions; None if all texts are tokens.
        held_out: Texts for verification; the last of several calibration texts if None.
        target_speedup: Speed-up of a whole prefill, with the least divergence.
        max_kl: The greatest divergence from dense attention in nats a token, as fast as possible.
        max_ppl_increase: The greatest relative increase of perplexity, as fast as possible.
        tokens: The most tokens of a text; what comes later is left out.
        rows: Sampled query rows for each head, layer and text.
        draws: Texts that are drawn from the model to find out how much its heads matter.
        rounds: The most plans that are verified.
        passkey_depths: Where numbers are hidden in a text that must still be found, if there is a tokenizer.
        backend: Sparse backend to verify with.
        profile: File in which scores are kept after each text, to go on from; none is kept if None.
        report: Called with a line of text at each phase.

    Raises:
        ValueError: If a number is out of range, or no or several dials are set.
    """

    tokenizer: Any = None
    held_out: Sequence[Given] | None = None
    target_speedup: float | None = None
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    tokens: int = 4096
    rows: int = 64
    draws: int = 1
    rounds: int = 4
    passkey_depths: Sequence[float] = DEPTHS
    backend: str = "auto"
    profile: str | Path | None = None
    report: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        given = self.objective
        if len(given) != 1:
            names = " and ".join(map(option, given)) or "none"
            raise ValueError(f"give one of {', '.join(map(option, DIALS))}, got {names}")
        ((name, value),) = given.items()
        least = 1.0 if name == "target_speedup" else 0.0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= least:
            raise ValueError(f"{option(name)} must be a number above {least:g}, got {value!r}")
        for name, least in (("tokens", LEAST_TOKENS), ("rows", 1), ("draws", 1), ("rounds", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{option(name)} must be a whole number >= {least}, got {value!r}")
        if any(not 0 <= depth <= 1 for depth in self.passkey_depths):
            raise ValueError(f"passkey_depths must be from 0 to 1, got {self.passkey_depths}")

    @property
    def objective(self) -> dict[str, float]:
        """The dial that is set, by name."""
        values = {name: getattr(self, name) for name in DIALS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def allowed_kl(self) -> float:
        """The divergence to begin with; perplexity rises about as fast as it at first."""
        limit = self.max_kl if self.max_kl is not None else self.max_ppl_increase
        assert limit is not None, "else there is a speed-up to reach"
        return limit

    def excess(self, kl: float, ppl_increase: float) -> float:
        """What was measured over what is allowed; at most 1 if it is kept."""
        if self.max_kl is not None:
            return kl / self.max_kl
        assert self.max_ppl_increase is not None, "else there is a speed-up to reach"
        return max(0.0, ppl_increase) / self.max_ppl_increase

    def keeps(self, kl: float, ppl_increase: float) -> bool:
        """Whether what was measured of quality is allowed."""
        return self.target_speedup is not None or self.excess(kl, ppl_increase) <= 1

    def met(self, kl: float, ppl_increase: float, speedup: float) -> bool:
        """Whether what was asked for was measured."""
        if self.target_speedup is not None:
            return speedup >= self.target_speedup
        return self.keeps(kl, ppl_increase)

    def say(self, text: str) -> None:
        """Report a line of text, if somebody listens."""
        if self.report is not None:
            self.report(text)

    def split(self, texts: Sequence[Given]) -> tuple[list[Given], list[Given]]:
        """Calibration and held-out texts.

        Raises:
            TypeError: If they are no lists.
            ValueError: If one of both is empty, or a text is in both.
        """
        single = str | Tensor | Mapping
        if isinstance(texts, single) or isinstance(self.held_out, single):
            raise TypeError("texts and held_out must be lists of texts, got a single one")
        given = list(texts)
        if self.held_out is not None:
            held = list(self.held_out)
        elif len(given) < 2:
            raise ValueError(f"give two texts or more, or held-out ones, got {len(given)}")
        else:
            given, held = given[:-1], given[-1:]
        if not given or not held:
            raise ValueError("searching needs a text to calibrate on and one to verify on")
        if {t for t in given if isinstance(t, str)} & {t for t in held if isinstance(t, str)}:
            raise ValueError(
                "held-out texts must not be calibration texts, got one text as both; the last text is held "
                "out where no others are"
            )
        return given, held

    def text(self, text: str | Tensor) -> Text:
        """A text as tokens, cut to `tokens`.

        Raises:
            ValueError: If it is too short, or there is no tokenizer for it.
        """
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError("a tokenizer must be given where texts aren't tokens")
            text = torch.tensor(self.tokenizer(text).input_ids)
        return Text.cut(text, self.tokens)
