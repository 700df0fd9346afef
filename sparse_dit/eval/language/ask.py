"""What a model answers to a question: tokens that it says, and how likely the right ones are to it.

The prompt is read in one prefill, which a plan makes sparse; the answer is decoded, which runs stock.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tasks import Question

PIECE = 8  # tokens of an answer read at once: fewer than a plan takes for a prefill
MORE = 4  # tokens said beyond the right answer's number


@dataclass(frozen=True)
class Answered:
    """How a question was answered.

    Args:
        found: Share of the answers that stand in what was said.
        exact: Whether each token of the answer was the likeliest after those before it.
        log_prob: Mean log-probability of the answer's tokens, each after those before it, in nats.
        floor: The same of another question's answer: about what is said without having found this one.
        said: What was said.
    """

    found: float
    exact: bool
    log_prob: float
    floor: float
    said: str


@torch.no_grad()
def ask(model: Any, tokenizer: Any, question: Question, other: Question) -> Answered:
    """Ask a model.

    Args:
        model: A causal language model, patched or not.
        tokenizer: Its tokenizer.
        question: What is asked.
        other: Another question of its kind, whose answer is wrong here.
    """
    read = _read(model, question)
    log_prob, exact = _likelihood(model, read, question.answer)
    floor, _ = _likelihood(model, read, other.answer)
    said = tokenizer.decode(_said(model, read, len(question.answer) + MORE))
    found = sum(answer in said for answer in question.answers) / len(question.answers)
    return Answered(found, exact, log_prob, floor, said)


@torch.no_grad()
def answers(model: Any, question: Question) -> bool:
    """Whether each token of the answer is the likeliest after those before it: `Answered.exact` alone."""
    return _likelihood(model, _read(model, question), question.answer)[1]


def _read(model: Any, question: Question) -> Any:
    prompt = question.prompt.to(model.device)
    return model(input_ids=prompt, use_cache=True, logits_to_keep=1)


def _likelihood(model: Any, read: Any, answer: Tensor) -> tuple[float, bool]:
    """Mean log-probability of the answer's tokens after a prompt, and whether all were the likeliest."""
    cache, logits = copy.deepcopy(read.past_key_values), [read.logits[0]]
    for piece in answer[:-1].to(model.device).split(PIECE):
        if len(piece):
            out = model(input_ids=piece[None], past_key_values=cache, use_cache=True)
            logits.append(out.logits[0])
    told = torch.cat(logits).float().log_softmax(-1).cpu()
    right = told.gather(1, answer[:, None])[:, 0]
    return right.mean().item(), bool((told.argmax(-1) == answer).all())


def _said(model: Any, read: Any, count: int) -> list[int]:
    """The likeliest tokens one by one; the prompt's cache is used up."""
    said, logits = [], read.logits
    for _ in range(count):
        said.append(int(logits[0, -1].argmax()))
        token = torch.tensor([said[-1:]], device=model.device)
        logits = model(input_ids=token, past_key_values=read.past_key_values, use_cache=True).logits
    return said
