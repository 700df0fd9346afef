"""What the model is taught: texts with masked tokens, and questions whose answers are masked.

The masks are those of LLaDA (https://arxiv.org/abs/2502.09992): each token of a text or an answer is masked
with probability t, drawn anew for each, and weighs 1 / t. What stands before a question stays whole, as
in use. A few tokens that aren't masked are replaced by others or asked for as they are, because
`LLaDA2Pipeline` also edits what stands already.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from random import Random

import torch
from torch import Tensor

from demos.tiny_dlm.questions import Question, fact, pass_key, pass_key_of
from demos.tiny_dlm.text import NAMES, Village, found_village, passages
from demos.tiny_dlm.tokens import END, MASK, build_tokenizer, number_of

LONGEST = 8192 + 64  # positions; shorter lessons are spread over as many
LEAST_MASKED = 0.05  # t is at least this
QUESTIONS = 0.7  # share of the lessons that have questions
ALONE = 0.75  # share of those in which one thing is hidden
WHOLE = 0.5  # share of answers that are masked wholly
CONTINUED = 0.3  # share of the other lessons in which only the end is masked
REPLACED, KEPT = 0.03, 0.03  # shares of the other tokens of a text or an answer


@dataclass
class Lessons:
    """One batch, all `[B, N]`.

    `seen` is what the model is given and `truth` what it should say; `weight` is 0 where it isn't asked and
    sums to 1 in each row; `key` marks digits of pass keys in wholly masked answers.
    """

    seen: Tensor
    truth: Tensor
    weight: Tensor
    key: Tensor
    positions: Tensor


def draw_lessons(batch: int, length: int, random: Random) -> Lessons:
    """A batch of lessons of that many tokens, at least 64."""
    torch_seed = torch.Generator().manual_seed(random.getrandbits(60))
    rows = []
    for i in range(batch):
        asked = random.random() < QUESTIONS if batch < 4 else i < QUESTIONS * batch
        rows.append((_question_row if asked else _text_row)(length, random))
    truth = torch.tensor([row.tokens for row in rows])
    share = torch.tensor([row.share for row in rows])  # t at each token, 0 where nothing is asked
    key = torch.tensor([row.key for row in rows], dtype=torch.bool)
    drawn = torch.rand(truth.shape, generator=torch_seed)
    drawn[torch.arange(batch), (share > 0).int().argmax(1)] = 0.0  # one masked token at least
    masked = drawn < share
    left = drawn - share  # uniform in [0, 1 - t) where a token isn't masked
    noise = torch.randint(3, len(build_tokenizer()), truth.shape, generator=torch_seed)
    open_ = (share > 0) & ~masked
    replaced = open_ & (left < REPLACED * (1 - share))
    kept = open_ & ~replaced & (left < (REPLACED + KEPT) * (1 - share))
    mask = number_of(MASK)
    seen = torch.where(masked, mask, torch.where(replaced, noise, truth))
    weight = torch.where(masked, 1 / share.clamp(min=LEAST_MASKED), (replaced | kept).float())
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
    positions = torch.stack([_positions(length, row.starts, random) for row in rows])
    return Lessons(seen, truth, weight, key & (share == 1), positions)


@dataclass
class _Row:
    tokens: list[int]
    share: list[float]
    key: list[bool]
    starts: list[int]  # where passages start, without the first


def encode(text: str) -> list[int]:
    """Token numbers of a passage or a question; of several in a row, those of the whole text."""
    return build_tokenizer()(text).input_ids


def fill_text(length: int, village: Village, random: Random) -> list[list[int]]:
    """Passages, as token numbers, of exactly that many tokens in all; the first may lack its beginning."""
    parts, left, source = [], length, passages(village, random)
    while left > 0:
        parts.append(encode(next(source))[-left:])
        left -= len(parts[-1])
    return parts[::-1]


def found_for(length: int, random: Random) -> Village:
    """A village of more people, the longer the text."""
    return found_village(random.randint(3, min(len(NAMES), 6 + length // 128)), random)


def _share(random: Random) -> float:
    return random.uniform(LEAST_MASKED, 1)


def _text_row(length: int, random: Random) -> _Row:
    text = fill_text(length, found_for(length, random), random)
    last = random.randint(32, min(length // 2, 160)) if random.random() < CONTINUED else length
    share = [0.0] * (length - last) + [_share(random)] * last
    return _Row([*chain(*text)], share, [False] * length, _starts(text))


def _starts(text: list[list[int]]) -> list[int]:
    return [*accumulate(map(len, text))][:-1]


def draw_questions(count: int, village: Village, random: Random) -> list[Question]:
    """Different questions about one text: one pass key, pass keys of some people, facts."""
    names = random.sample([who.name for who in village.people], len(village.people))
    found: dict[str, Question] = {}
    for _ in range(count):
        kind = random.random()
        if kind < 0.3:
            question = pass_key(random)
        elif kind < 0.8 and names:
            question = pass_key_of(names.pop(), random)
        else:
            question = fact(village, random)
        found.setdefault(question.asked, question)
    return random.sample(list(found.values()), len(found))


def _choose(length: int, village: Village, random: Random) -> list[tuple[Question, bool]]:
    """What is hidden in a text and whether it is asked for: in most texts one thing, in the others
    several questions and, first after one of them, pass keys that no question asks for."""
    if random.random() < ALONE:
        return [(question, True) for question in draw_questions(1, village, random)]
    questions = draw_questions(random.randint(4, 6 + min(6, length // 64)), village, random)
    asked = random.randint(1, min(6, max(1, length // 64)))
    first, *rest = [(question, i < asked) for i, question in enumerate(questions)]
    return [first, *random.sample(rest, len(rest))]


def _question_row(length: int, random: Random) -> _Row:
    village = found_for(length, random)
    hidden, asked, last = [], [], random.randint(2, min(40, length // 8))
    left = length - last
    for question, is_asked in _choose(length, village, random):
        one = encode(question.hidden)
        prompt, answer = encode(question.prompt), encode(question.answer)
        cost = len(one) + (len(prompt) + len(answer) + 1 if is_asked else 0)
        if cost > left - 2 and asked:
            continue
        left -= cost
        hidden.append(one)
        if is_asked:
            asked.append((prompt, answer))
    end = number_of(END)
    answers = [[*answer, end] for _, answer in asked]
    answers[-1] += [end] * last
    if random.random() < 0.3:  # the block ends within the answer, and the text is longer instead
        answers[-1] = answers[-1][: random.randint(2, len(answers[-1]))]
    behind = sum(len(prompt) for prompt, _ in asked) + sum(map(len, answers))
    text = fill_text(length - behind - sum(map(len, hidden)), village, random)
    for one in hidden:
        text.insert(random.randint(1, len(text)), one)
    row = _Row([*chain(*text)], [], [], [*_starts(text), length - behind])
    row.share, row.key = [0.0] * len(row.tokens), [False] * len(row.tokens)
    for (prompt, _), answer in zip(asked, answers, strict=True):
        share = 1.0 if random.random() < WHOLE else _share(random)
        row.tokens += prompt + answer
        row.share += [0.0] * len(prompt) + [share] * len(answer)
        row.key += [False] * len(prompt) + [token in _numbers() for token in answer]
    return row


@cache
def _numbers() -> frozenset[int]:
    """Tokens of three digits, and of two that follow them: those that pass keys consist of."""
    known = build_tokenizer().get_vocab()
    return frozenset(known[word] for word in known if word.isdecimal() and len(word) > 1)


def _positions(length: int, starts: list[int], random: Random) -> Tensor:
    """Positions from 0 on, for half of the lessons with gaps between passages, so that short lessons
    teach far ones (PoSE, https://arxiv.org/abs/2309.10400)."""
    positions = torch.arange(length)
    spare = LONGEST - length
    if random.random() < 0.5 or spare <= 0 or not starts:
        return positions
    total = int(spare ** random.random())
    chosen = random.sample(starts, random.randint(1, min(4, len(starts))))
    for start in chosen:
        positions[start:] += total // len(chosen)
    return positions
