"""Patterns scored on texts and questions, one after another, from what is kept of them on, and timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...call import Intercept
from ...integrations import attached, heads_of
from ...patterns import Pattern
from ..profile_file import only_writer
from .costs import Costs
from .items import Item
from .kept import conditions, read_scores, write_scores
from .options import LanguageOptions
from .problem import Scores
from .reading import Text, passkeys
from .scores import COMPONENT, Scorer, Timing, influences

ASKED_AT = (0.35, 0.65)  # depths of the questions that patterns are scored on; others verify
QUESTIONS = 0.5  # what an answer's divergence counts, beside a text's


def scored(
    model: Any, options: LanguageOptions, texts: Sequence[Text], patterns: Sequence[Pattern]
) -> tuple[Scores, Costs]:
    """The scores of patterns by layer and modality, and what attention in the middle layer takes by each.

    Args:
        model: The model, not patched.
        options: What is asked for. If they name a profile, scores are kept there after each text, and those
            that are there already are taken up.
        texts: What patterns are scored on, beside questions for what is hidden in others.
        patterns: The K candidates, dense first.

    Raises:
        ValueError: If the profile is damaged or of something else, or another process writes it.
        NotImplementedError: If no plan can be found for the model.
    """
    items, scores = _items(options, texts), {}
    file = None if options.profile is None else Path(options.profile)
    with only_writer(file or "", file is not None):
        of, done = {}, 0
        if file is not None:
            of = conditions(model, patterns, items, options.draws)
            if file.exists():
                scores, done = read_scores(file, of, patterns, model)
                options.say(f"{file} holds the scores of {done} of {len(items)} texts")
        for number, item in enumerate(items[done:], done):
            what = f"text {number + 1}/{len(items)}, {item.text.ids.shape[1]} tokens"
            options.say(f"scoring {len(patterns)} patterns on {what}")
            grads = influences(model, item, options.draws, seed=number)
            _prefill(model, item, Scorer(patterns, item, grads, scores))
            if file is not None:
                write_scores(scores, number + 1, of, file)
    names = list(heads_of(model))
    timing = Timing(names[len(names) // 2], patterns)
    _prefill(model, items[0], timing)
    if not scores or timing.costs is None:
        raise NotImplementedError(
            f"no plan can be found for {type(model).__name__}: its middle layer doesn't attend in plain "
            'causal order; sparse_dit.patch(model, "exact") skips what its masks hide'
        )
    return scores, timing.costs


def _items(options: LanguageOptions, texts: Sequence[Text]) -> list[Item]:
    """The texts, and questions for what is hidden in others."""
    items = [
        Item.of_text(text, options.rows, 2 * number, 1 / len(texts))
        for number, text in enumerate(texts)
    ]
    if options.tokenizer is not None and options.passkey_depths:
        tokens = texts[0].ids.shape[1]
        asked = passkeys(options.tokenizer, tokens, ASKED_AT, seed=1)
        items += [Item.of_passkey(p, options.rows, 1, QUESTIONS / len(asked)) for p in asked]
    return items


def _prefill(model: Any, item: Item, intercept: Intercept) -> None:
    """One prefill of a text that an intercept sees."""
    inputs = item.text.inputs_on(model.device)
    with torch.no_grad(), attached(model, {COMPONENT: intercept}):
        model(**inputs, use_cache=False, logits_to_keep=1)
