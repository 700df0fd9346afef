"""The questions: what each hides, its length, and how answers are scored."""

import pytest
import torch

from sparse_dit.eval.language import haystack
from sparse_dit.eval.language.ask import ask
from sparse_dit.eval.language.tasks import KINDS, passkey_questions, question
from tests.helpers.tiny_language_models import text, tokenizer

TOKENS = 3000


@pytest.fixture(scope="module")
def letters():
    return tokenizer()


def said(letters, asked):
    return "".join(letters.convert_ids_to_tokens(asked.prompt[0].tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_has_its_length_and_is_the_same_for_its_seed(letters, kind):
    asked = question(kind, letters, TOKENS, 0)
    assert TOKENS - 300 < asked.prompt.shape[1] <= TOKENS
    assert torch.equal(asked.prompt, question(kind, letters, TOKENS, 0).prompt)
    other = question(kind, letters, TOKENS, 1)
    assert asked.answers != other.answers or not torch.equal(asked.prompt, other.prompt)
    whole = "".join(letters.convert_ids_to_tokens(asked.answer.tolist()))
    assert whole == " " + ", ".join(asked.answers)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_stands_in_the_text_and_not_in_the_question(letters, kind):
    body, asked = said(letters, found := question(kind, letters, TOKENS, 0)).rsplit("\n", 1)
    assert all(answer in body for answer in found.answers)
    assert not any(answer in asked for answer in found.answers)


def test_facts_are_as_many_as_the_kind_says(letters):
    def facts(kind):
        return said(letters, question(kind, letters, TOKENS, 0)).count("The secret code of")

    assert facts("needle in noise") == 2, "the question begins so too"
    assert facts("one key of four") == 5
    assert facts("four values") == 4
    assert facts("one key of many") > 20


def test_the_chain_can_be_followed(letters):
    body = said(letters, found := question("variables", letters, TOKENS, 0))
    first, *rest = found.answers
    assert f"Set {first} to " in body
    places = [body.index(f"Set {name} to ") for name in found.answers]
    assert places == sorted(places)
    for before, name in zip(found.answers, rest, strict=False):
        assert f"Set {name} to the value of {before}." in body


def test_words_that_are_asked_for_are_the_most_common(letters):
    for kind, count in (("common words", 10), ("frequent words", 3)):
        asked = question(kind, letters, TOKENS, 0)
        listed = said(letters, asked).split("\n")[0].split()
        most = sorted(set(listed), key=lambda word: -listed.count(word))[:count]
        assert set(most) == set(asked.answers)
    counts = [listed.count(word) for word in asked.answers]
    assert counts == sorted(counts, reverse=True)


def test_a_text_that_is_too_short_is_an_error(letters):
    with pytest.raises(ValueError, match="'long needle' needs a text of more than 256 tokens"):
        question("long needle", letters, 256, 0)


def test_a_python_without_sources_says_what_to_do(monkeypatch):
    monkeypatch.setattr(haystack, "MODULES", ("no_such_module",))
    with pytest.raises(ValueError, match="give --text FILE"):
        haystack.sources()


class Reader:
    """Says what it is told, whatever it is asked, and holds it likely; it keeps no cache."""

    device = torch.device("cpu")

    def __init__(self, prompt, said):
        self.prompt, self.said = prompt, said

    def __call__(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        from types import SimpleNamespace

        known = past_key_values if past_key_values is not None else []
        known += input_ids[0].tolist()
        ahead = range(len(known) - input_ids.shape[1] + 1, len(known) + 1)
        logits = torch.zeros(1, len(ahead), 128)
        for row, n in enumerate(ahead):
            at = n - self.prompt
            logits[0, row, self.said[at] if 0 <= at < len(self.said) else 0] = 9.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], past_key_values=known)


def test_answers_are_scored_by_what_is_said_and_by_their_likelihood(letters):
    mine, other = (question("four keys", letters, TOKENS, n) for n in (0, 1))
    knows = ask(Reader(mine.prompt.shape[1], mine.answer.tolist()), letters, mine, other)
    assert knows.exact and knows.found == 1.0
    assert knows.log_prob > -0.1 > -3 > knows.floor
    half = mine.answer.tolist()[:18]
    part = ask(Reader(mine.prompt.shape[1], half), letters, mine, other)
    assert part.found == 0.5 and not part.exact
    assert part.log_prob < -3


def test_a_real_model_gives_the_same_likelihood_as_one_forward(letters):
    model, _ = text("llama")
    mine, other = passkey_questions(letters, 400, (0.2, 0.8))
    found = ask(model, letters, mine, other)
    whole = torch.cat([mine.prompt[0], mine.answer])[None]
    with torch.no_grad():
        told = model(whole).logits[0].log_softmax(-1)
    rows = told[mine.prompt.shape[1] - 1 : -1]
    assert found.log_prob == pytest.approx(
        rows.gather(1, mine.answer[:, None]).mean().item(), abs=1e-5
    )
    assert mine.depth == 0.2 and mine.answers[0].isdigit() and len(mine.answers[0]) == 5
