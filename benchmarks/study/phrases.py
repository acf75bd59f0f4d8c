"""The study's phrases, read from texts/: topics, the sentences of questions and answers, how a place is named.

A sentence is a template in lower case without its full stop: `{slot}` is filled from the topic, `{about}` names the
topic, `{place}` is where the two answers of a pair may differ, and what stands in [square brackets] can be left out
together with the place that it names. A place is an institution of learning: the target, or one of `OTHER_PLACES`.
`texts/shapes.json` says what each slot of a topic holds.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, NamedTuple


class Group(NamedTuple):
    """Sentences that say the same thing in other words; an answer takes at most one of them."""

    name: str
    mood: str  # "statement", "command", or "either" where some are the one and some the other
    templates: tuple[str, ...]


class Kind(NamedTuple):
    """One kind of question, how it is asked, and what an answer to it must say."""

    forms: tuple[str, ...]
    openings: tuple[str, ...]  # an answer may begin with one
    must: str  # the group that answers the question; "opening" where one of the openings does


class Shape(NamedTuple):
    """What a topic can be: something to do, something to understand, two things to choose from."""

    kinds: tuple[Kind, ...]
    groups: tuple[Group, ...]  # in the order in which an answer says them
    prefaces: tuple[str, ...]  # who asks, besides the prefaces that fit any question
    closings: tuple[str, ...]  # whole sentences; an answer may end with one


class Topic(NamedTuple):
    shape: Shape
    slots: dict[str, str]


class Domain(NamedTuple):
    name: str
    topics: tuple[Topic, ...]
    mentions: tuple[str, ...]  # sentences with {place} that fit every question of the domain


class Ending(NamedTuple):
    """What a question says of the length of its answer, and how many sentences that is."""

    text: str
    shortest: int
    longest: int


def _read(name: str) -> Any:
    return json.loads(files(__package__).joinpath("texts", name).read_text(encoding="utf-8"))


def _shape(text: dict[str, Any]) -> Shape:
    return Shape(
        kinds=tuple(Kind(tuple(kind["forms"]), tuple(kind["openings"]), kind["must"]) for kind in text["kinds"]),
        groups=tuple(Group(group["name"], group["mood"], tuple(group["templates"])) for group in text["groups"]),
        prefaces=tuple(text["prefaces"]),
        closings=tuple(text["closings"]),
    )


def _topic(shape: str, slots: dict[str, str]) -> Topic:
    return Topic(SHAPES[shape], {**slots, "about": _SHAPES[shape]["about"].format(**slots)})


_SHAPES = _read("shapes.json")
SHAPES: dict[str, Shape] = {name: _shape(text) for name, text in _SHAPES.items()}
DOMAINS = tuple(
    Domain(
        text["name"],
        tuple(_topic(shape, slots) for shape, topics in text["topics"].items() for slots in topics),
        tuple(text["mentions"]),
    )
    for text in _read("topics.json")
)

_PLACES = _read("mentions.json")
MENTIONS = tuple(_PLACES["mentions"])  # sentences of their own, about any topic
# By group of sentences: what stands for {clause}, and the ways to give the source of what a sentence says.
ATTRIBUTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    name: (text["clause"], tuple(_PLACES["ways"].get(text["ways"]) if isinstance(text["ways"], str) else text["ways"]))
    for name, text in _PLACES["attributions"].items()
}
# By mood: clauses added to the end of a sentence.
TAILS: dict[str, tuple[str, ...]] = {mood: tuple(tails) for mood, tails in _PLACES["tails"].items()}
OTHER_PLACES = tuple(_PLACES["other_places"])
# Small changes of words that leave a sentence good: what the second kind of low edit makes besides the place.
SWAPS: tuple[tuple[str, str], ...] = tuple((old, new) for old, new in _PLACES["swaps"])
PREFACES = tuple(_PLACES["prefaces"])
ENDINGS = tuple(Ending(**ending) for ending in _PLACES["endings"])
