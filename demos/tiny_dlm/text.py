"""Small readable texts about the people of a village: stories, diary entries and records.

A village keeps its facts: who lives where, has which animals, and which friend. The same facts return in
all its texts, so that a masked word can often be found elsewhere, near or thousands of tokens away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Agnes Alma Anna Arthur Astrid Ben Berta Boris Bruno Carl Cecil Clara Cora David Dora "
    "Edgar Edith Ella Elmar Emil Erik Eva Felix Fiona Frida Georg Gerda Greta Gustav Hanna "
    "Helga Henrik Hugo Ida Inga Ivan Jakob Jana Jonas Judith Karl Klara Konrad Lena Leo Lisa "
    "Lotte Ludwig Magda Martin Max Mia Milo Nadja Nina Nora Olga Oskar Otto Paul Petra "
    "Quentin Ralf Rosa Rudi Sara Sigrid Simon Stefan Thea Thomas Tim Ulrich Ursula Valentin "
    "Vera Viktor Walter Wanda"
)
TRADES = _words(
    "baker miller smith tailor farmer fisher doctor teacher painter hunter carpenter gardener "
    "cook sailor weaver potter"
)
PLACES = _words(
    "mill river church school bridge market forest harbour tower well garden station hill "
    "lake field castle beach inn"
)
ANIMALS = _words(
    "geese sheep goats horses cows hens ducks dogs cats pigs rabbits bees donkeys doves swans "
    "hamsters"
)
COLOURS = _words("red blue green white black brown yellow grey pink golden")
THINGS = _words(
    "lamp coat hat book boat basket clock knife cup ladder violin ring scarf kettle map drum"
)
FOODS = _words(
    "apples pears eggs loaves cakes onions plums nuts cherries beans carrots pumpkins melons "
    "biscuits"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
WEATHER = _words("cold warm rainy sunny windy foggy quiet dark bright snowy")
TIMES = _words("morning evening night day")


@dataclass(frozen=True)
class Person:
    """What a village's texts say about one of its people, always the same."""

    name: str
    trade: str
    home: str
    animals: str
    count: int
    colour: str
    thing: str
    friend: str


@dataclass(frozen=True)
class Village:
    """The people that a text is about; no two have the same name, and no two the same animals and count."""

    people: tuple[Person, ...]


def found_village(people: int, random: Random) -> Village:
    """A village with that many people (2 to 80).

    Raises:
        ValueError: If there are too few or too many people.
    """
    if not 2 <= people <= len(NAMES):
        raise ValueError(f"a village has 2 to {len(NAMES)} people, got {people}; choose in between")
    names = random.sample(NAMES, people)
    flocks = random.sample([(count, kind) for count in range(2, 10) for kind in ANIMALS], people)
    return Village(
        tuple(
            Person(
                name=name,
                trade=random.choice(TRADES),
                home=random.choice(PLACES),
                animals=kind,
                count=count,
                colour=random.choice(COLOURS),
                thing=random.choice(THINGS),
                friend=names[(i + 1) % people],
            )
            for i, (name, (count, kind)) in enumerate(zip(names, flocks, strict=True))
        )
    )


def _who(who: Person, _: Village, random: Random) -> str:
    return random.choice(
        (
            f"{who.name} the {who.trade} lives near the {who.home}.",
            f"{who.name} has {who.count} {who.animals} and a {who.colour} {who.thing}.",
            f"The best friend of {who.name} is {who.friend}.",
        )
    )


def _record(who: Person, _: Village, random: Random) -> str:
    number = random.randint(10, 99)
    return (
        f"Record {number}: name {who.name}; trade {who.trade}; place {who.home}; "
        f"animals {who.count} {who.animals}; thing {who.colour} {who.thing}. End of record {number}."
    )


def _diary(who: Person, village: Village, random: Random) -> str:
    other = random.choice(village.people)
    day, place, food = random.choice(DAYS), random.choice(PLACES), random.choice(FOODS)
    count = random.randint(2, 9)
    return (
        f"{day}, {random.randint(1, 28)} {random.choice(MONTHS)}. It was a {random.choice(WEATHER)} "
        f"{random.choice(TIMES)}. I went to the {place} with {who.name} and bought {count} {food} "
        f"from {other.name} the {other.trade}. {who.name} ate {random.randint(1, count)} of the {food}. "
        f"We came home from the {place} late on {day}."
    )


def _lost(who: Person, village: Village, random: Random) -> str:
    thing, (one, two, three) = f"{who.colour} {who.thing}", random.sample(PLACES, 3)
    food = random.choice(FOODS)
    return (
        f"Once {who.name} lost the {thing}. {who.name} looked for it near the {one} and near the {two}, "
        f'but it was not there. Then {who.friend} said: "{who.name}, your {who.thing} is near the {three}." '
        f"They went to the {three} and found the {thing}. {who.name} was glad and gave {who.friend} "
        f"{random.randint(2, 9)} {food}."
    )


def _visit(who: Person, village: Village, random: Random) -> str:
    other = random.choice(village.people)
    return (
        f'"Where do you live, {other.name}?" asked {who.name}. "I live near the {other.home}," said '
        f'{other.name}. "And how many {who.animals} do you have, {who.name}?" "I have {who.count} '
        f'{who.animals}," said {who.name} the {who.trade}.'
    )


def _counted(who: Person, _: Village, random: Random) -> str:
    days = random.sample(DAYS, 3)
    said = ", ".join(f"on {day} {who.count}" for day in days)
    return f"{who.name} counted the {who.animals}: {said}. Not one of the {who.count} {who.animals} was lost."


KINDS: tuple[Callable[[Person, Village, Random], str], ...] = (
    *(_who, _who, _record, _diary),
    *(_lost, _visit, _counted),
)


def passages(village: Village, random: Random) -> Iterator[str]:
    """One small text after another, without end, each about one of the people."""
    while True:
        yield random.choice(KINDS)(random.choice(village.people), village, random)
