"""What the model is taught: texts with masked tokens, and questions whose answers are masked.

The masks are those of LLaDA (https://arxiv.org/abs/2502.09992): each token of a text or an answer is masked
with probability t, drawn anew for each, and weighs 1 / t. What stands before a question stays whole, as
in use. A few tokens that aren't masked are replaced by others or asked for as they are, because
`LLaDA2Pipeline` also edits what stands already.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from random import Random

import torch
from torch import Tensor

from demos.tiny_dlm.questions import Question, fact, pass_key, pass_key_of
from demos.tiny_dlm.text import NAMES, Village, found_village, passages
from demos.tiny_dlm.tokens import END, build_tokenizer

LONGEST = 8192 + 64  # positions; shorter lessons are spread over as many
LEAST_MASKED = 0.05  # t is at least this
QUESTIONS, CONTINUED, WHOLE = 0.6, 0.3, 0.4  # shares: lessons with questions; texts masked at
# their end alone; answers masked wholly
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
    masked = drawn < share
    left = drawn - share  # uniform in [0, 1 - t) where a token isn't masked
    noise = torch.randint(3, len(build_tokenizer()), truth.shape, generator=torch_seed)
    open_ = (share > 0) & ~masked
    replaced = open_ & (left < REPLACED * (1 - share))
    kept = open_ & ~replaced & (left < (REPLACED + KEPT) * (1 - share))
    mask = build_tokenizer().mask_token_id
    seen = torch.where(masked, mask, torch.where(replaced, noise, truth))
    weight = torch.where(masked, 1 / share.clamp(min=LEAST_MASKED), (replaced | kept).float())
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
    positions = torch.stack([_positions(length, random) for _ in rows])
    return Lessons(seen, truth, weight, key & (share == 1), positions)


@dataclass
class _Row:
    tokens: list[int]
    share: list[float]
    key: list[bool]


def _encode(text: str) -> list[int]:
    return build_tokenizer()(text).input_ids


def fill_text(length: int, village: Village, random: Random) -> list[list[int]]:
    """Passages, as token numbers, of exactly that many tokens in all; the first may lack its beginning."""
    parts, left, source = [], length, passages(village, random)
    while left > 0:
        parts.append(_encode(next(source))[-left:])
        left -= len(parts[-1])
    return parts[::-1]


def found_for(length: int, random: Random) -> Village:
    """A village of more people, the longer the text."""
    return found_village(random.randint(3, min(len(NAMES), 6 + length // 128)), random)


def _share(random: Random) -> float:
    return random.uniform(LEAST_MASKED, 1)


def _text_row(length: int, random: Random) -> _Row:
    tokens = [*chain(*fill_text(length, found_for(length, random), random))]
    last = random.randint(32, min(length // 2, 160)) if random.random() < CONTINUED else length
    share = [0.0] * (length - last) + [_share(random)] * last
    return _Row(tokens, share, [False] * length)


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


def _question_row(length: int, random: Random) -> _Row:
    village = found_for(length, random)
    questions = draw_questions(random.randint(1, max(1, min(10, length // 48))), village, random)
    hidden, asked, last = [], [], random.randint(2, min(40, length // 8))
    left = length - last
    for question in questions:
        one = _encode(question.hidden)
        prompt, answer = _encode(question.prompt), _encode(question.answer)
        cost = len(one) + len(prompt) + len(answer) + 1
        if cost > left - 8 and asked:
            break
        left -= cost
        hidden.append(one)
        asked.append((prompt, answer))
    text = fill_text(left, village, random)
    for one in hidden:
        text.insert(random.randint(1, len(text)), one)
    row = _Row([*chain(*text)], [], [])
    row.share, row.key = [0.0] * len(row.tokens), [False] * len(row.tokens)
    end = build_tokenizer().convert_tokens_to_ids(END)
    for i, (prompt, answer) in enumerate(asked):
        fill = last if i == len(asked) - 1 else 0
        answered = [*answer, *[end] * (1 + fill)]
        if fill and random.random() < 0.3:  # the block ends within the answer: nothing follows
            answered = answered[: random.randint(2, len(answered))]
        share = 1.0 if random.random() < WHOLE else _share(random)
        row.tokens += prompt + answered
        row.share += [0.0] * len(prompt) + [share] * len(answered)
        digits = [
            position < 5 and token in _digit_tokens() for position, token in enumerate(answered)
        ]
        row.key += [False] * len(prompt) + digits
    missing = length - len(row.tokens)  # of a block that ended early: the text is longer instead
    if missing:
        extra = [*chain(*fill_text(missing, village, random))]
        row = _Row(extra + row.tokens, [0.0] * missing + row.share, [False] * missing + row.key)
    return row


def _digit_tokens() -> set[int]:
    tokenizer = build_tokenizer()
    return set(tokenizer.convert_tokens_to_ids([*"0123456789", *(f"Ġ{d}" for d in range(1, 10))]))


def _positions(length: int, random: Random) -> Tensor:
    """Positions from 0 on, for half of the lessons with gaps, so that short lessons teach far ones (PoSE,
    https://arxiv.org/abs/2309.10400)."""
    positions = torch.arange(length)
    spare = LONGEST - length
    if random.random() < 0.5 or spare <= 0:
        return positions
    total = int(spare ** random.random())
    gaps = random.randint(1, 6)
    for _ in range(gaps):
        positions[random.randint(1, length - 1) :] += total // gaps
    return positions
