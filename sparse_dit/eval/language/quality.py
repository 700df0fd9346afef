"""What a plan does to a language model, beside dense attention: texts it reads, questions it is asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...patch import EXACT, patch
from ...plan import Plan
from ...search.language.options import DEPTHS
from ...search.language.prompts import read_prompt
from ...search.language.reading import LEAST_TOKENS, Read, Text, read
from ...timing import Pairs, Taken
from .ask import Answered, ask
from .tasks import KINDS, Question, passkey_questions, question

Say = Callable[[str], None]
WARM_UP = 256  # tokens read before anything is timed
NOISE_FLOOR = (
    "dense once more, by sparse_dit's kernel in place of PyTorch's: what rounding alone changes"
)


@dataclass(frozen=True, kw_only=True)
class LanguageRequest:
    """What a plan is measured on.

    Args:
        texts: What is read, by name: texts, or prompts with images or videos as a VLM's processor makes them.
        tokens: The most tokens of a text; what comes later is left out.
        lengths: Lengths of questions in tokens.
        kinds: Kinds of question among `tasks.KINDS`.
        samples: Questions of each kind and length.

    Raises:
        ValueError: If anything is out of range.
    """

    texts: Mapping[str, str | Mapping[str, Tensor]]
    tokens: int = 4096
    lengths: Sequence[int] = ()
    kinds: Sequence[str] = tuple(KINDS)
    samples: int = 1

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("a language model is measured on a text, got none; give --text FILE")
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"tasks must be among {', '.join(KINDS)}, got {sorted(unknown)}")
        for name, values in (("tokens", [self.tokens]), ("lengths", self.lengths)):
            if any(value < LEAST_TOKENS for value in values):
                raise ValueError(f"{name} must be at least {LEAST_TOKENS}, got {values}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    @property
    def asked_at(self) -> Sequence[int]:
        """Lengths of questions: that of the texts if none is given."""
        return self.lengths or (self.tokens,)

    @property
    def asks(self) -> bool:
        """Whether questions about texts are asked; a model that is given prompts alone may know no text."""
        return any(isinstance(text, str) for text in self.texts.values())

    def read_by(self, model: Any, tokenizer: Any) -> dict[str, Text]:
        """The texts as tokens.

        Raises:
            ValueError: If one is too short, or no prompt.
        """
        return {
            name: Text.cut(torch.tensor(tokenizer(text).input_ids), self.tokens, f"{name} has")
            if isinstance(text, str)
            else read_prompt(model, text)
            for name, text in self.texts.items()
        }


@dataclass(frozen=True)
class TextQuality:
    """One text, read dense and sparse in turn.

    Args:
        name: The text's name.
        tokens: How many were read.
        dense_loss, sparse_loss: Mean negative log-likelihood of its own next tokens, in nats.
        kl: Mean divergence of what is said from dense, in nats a token.
        kl_floor: The same of `NOISE_FLOOR`.
        agreement: Share of the places whose most likely next token is that of dense.
        density: Computed pairs over those of causal order, in all layers.
        dense, sparse, exact: How long the readings took.
    """

    name: str
    tokens: int
    dense_loss: float
    sparse_loss: float
    kl: float
    kl_floor: float
    agreement: float
    density: float
    dense: Taken
    sparse: Taken
    exact: Taken

    @property
    def dense_perplexity(self) -> float:
        """At the places that are compared."""
        return math.exp(self.dense_loss)

    @property
    def sparse_perplexity(self) -> float:
        """The same with the plan."""
        return math.exp(self.sparse_loss)


@dataclass(frozen=True)
class QuestionQuality:
    """One question, answered dense and sparse; `tokens` is the length that was asked for."""

    question: Question
    tokens: int
    dense: Answered
    sparse: Answered


@dataclass(frozen=True)
class LanguageQuality:
    """A plan beside dense attention.

    Args:
        texts: One for each text.
        questions: Passkeys first, then a kind after the other.
        summary: What ran, as text.
        sparse_calls: Attention calls of texts that ran sparse.
    """

    texts: Sequence[TextQuality]
    questions: Sequence[QuestionQuality]
    summary: str
    sparse_calls: int

    @property
    def pairs(self) -> Pairs:
        """The times of the readings."""
        return Pairs([t.dense for t in self.texts], [t.sparse for t in self.texts])

    @property
    def density(self) -> float:
        """Mean over texts."""
        return sum(t.density for t in self.texts) / len(self.texts)

    @property
    def kl(self) -> float:
        """Mean over texts, in nats a token."""
        return sum(t.kl for t in self.texts) / len(self.texts)

    def of_kind(self, kind: str) -> list[QuestionQuality]:
        """The questions of a kind."""
        return [asked for asked in self.questions if asked.question.kind == kind]


def evaluate(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    request: LanguageRequest,
    say: Say,
    texts: Mapping[str, Text] | None = None,
) -> LanguageQuality:
    """Measure a plan beside dense attention.

    Args:
        model: A causal language model, not patched.
        tokenizer: Its tokenizer.
        plan: For that model.
        request: What it is measured on.
        say: Called with a line of text before each part.
        texts: The request's, as `read_by` gives them, which they are read by if None.

    Raises:
        ValueError: If a text or a length is too short.
    """
    texts = request.read_by(model, tokenizer) if texts is None else texts
    asked = list(questions(tokenizer, request)) if request.asks else []
    warm_up(model, next(iter(texts.values())))
    rows, summaries, calls = [], [], 0
    for name, text in texts.items():
        say(f"{name}, {text.ids.shape[1]} tokens, dense and sparse")
        row, summary = _read(model, plan, name, text)
        rows.append(row)
        summaries.append(f"{name}: {summary}")
        calls += summary.sparse_calls
    answered = []
    for number, (length, mine, other) in enumerate(asked, 1):
        say(f"question {number}/{len(asked)}: {mine.kind}, {length} tokens")
        dense = ask(model, tokenizer, mine, other)
        with patch(model, plan):
            sparse = ask(model, tokenizer, mine, other)
        answered.append(QuestionQuality(mine, length, dense, sparse))
    return LanguageQuality(rows, answered, "\n".join(summaries), calls)


def questions(tokenizer: Any, request: LanguageRequest) -> Iterator[tuple[int, Question, Question]]:
    """Every question with its length, and another one of its kind whose answer is wrong."""
    for length in request.asked_at:
        hidden = passkey_questions(tokenizer, length, DEPTHS)
        (spare,) = passkey_questions(tokenizer, length, DEPTHS[:1], seed=1)
        for mine, other in zip(hidden, [*hidden[1:], spare], strict=True):
            yield length, mine, other
        for kind in request.kinds:
            found = [question(kind, tokenizer, length, n) for n in range(request.samples + 1)]
            for mine, other in itertools.pairwise(found):
                yield length, mine, other


def warm_up(model: Any, text: Text) -> None:
    """What happens at the first forward of a process isn't part of what is timed."""
    short = text if text.others else Text.of(text.ids[:, :WARM_UP])
    read(model, short)
    with patch(model, EXACT):
        read(model, short)


def _read(model: Any, plan: Plan, name: str, text: Text) -> tuple[TextQuality, Any]:
    """A text read dense, with the plan and exactly, and what ran with the plan."""
    dense = read(model, text)
    with patch(model, plan) as handle:
        sparse = read(model, text)
    summary = handle.summary()
    with patch(model, EXACT):
        exact: Read = read(model, text)
    density = 1.0 if summary.density is None else summary.density
    return TextQuality(
        name,
        text.ids.shape[1],
        dense.loss(text),
        sparse.loss(text),
        sparse.divergence(dense),
        max(0.0, exact.divergence(dense)),  # rounding may take it below
        sparse.agreement(dense),
        density,
        dense.taken,
        sparse.taken,
        exact.taken,
    ), summary
