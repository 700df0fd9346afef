"""Questions whose answer stands somewhere in the text before them: pass keys and facts of a village."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from demos.tiny_dlm.text import Village


@dataclass(frozen=True)
class Question:
    """A sentence hidden in the text (none for a fact that is there anyway), a question and its answer."""

    hidden: str
    asked: str
    answer: str

    @property
    def prompt(self) -> str:
        """What stands directly before the answer."""
        return f"Question: {self.asked} Answer:"


def _digits(random: Random) -> str:
    return f"{random.randint(10_000, 99_999)}"


def pass_key(random: Random) -> Question:
    """The one pass key of a text."""
    key = _digits(random)
    return Question(
        f"The pass key is {key}. Remember it.", "What is the pass key?", f"{key} is the pass key."
    )


def pass_key_of(name: str, random: Random) -> Question:
    """A pass key among others, told apart by a name."""
    key = _digits(random)
    return Question(
        f"The pass key of {name} is {key}. Remember it.",
        f"What is the pass key of {name}?",
        f"{key} is the pass key of {name}.",
    )


def fact(village: Village, random: Random) -> Question:
    """Something that a passage about one of the people says; it is hidden in the text once more."""
    who = random.choice(village.people)
    home = f"{who.name} the {who.trade} lives near the {who.home}."
    goods = f"{who.count} {who.animals} and a {who.colour} {who.thing}."
    flock = f"{who.name} has {goods}"
    return random.choice(
        (
            Question(home, f"Where does {who.name} live?", f"Near the {who.home}."),
            Question(home, f"What is the trade of {who.name}?", f"{who.trade}."),
            Question(flock, f"What does {who.name} have?", goods),
            Question(flock, f"Who has {who.count} {who.animals}?", f"{who.name}."),
        )
    )
