"""What the study's questions can be about: three shapes of topic, each with its slots, and the form of their sentences.

A sentence is a template in lower case without its full stop: `{slot}` is filled from the topic, `{about}` names the
topic, `{place}` is where the two answers of a pair may differ, and what stands in [square brackets] can be left out
together with the place that it names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar


class HowTo(NamedTuple):
    """Something to do."""

    do: str  # bare infinitive
    doing: str  # gerund
    tool: str  # a thing, with its article
    time: str  # a duration
    first: str  # a command
    then: str  # a command
    why: str  # a statement that stands on its own
    avoid: str  # gerund
    sign: str  # a statement

    @property
    def slots(self) -> dict[str, str]:
        return {**self._asdict(), "about": self.doing}


class Why(NamedTuple):
    """Something to understand."""

    question: str  # with its question mark
    clause: str  # the question as a subordinate clause
    about: str  # a noun phrase
    cause: str  # a statement, the answer
    detail: str  # another statement
    test: str  # a command: what shows it
    myth: str  # a statement that is false

    @property
    def slots(self) -> dict[str, str]:
        return self._asdict()


class Choice(NamedTuple):
    """Two things to choose from."""

    a: str  # noun phrase
    b: str  # noun phrase
    factor: str  # noun phrase or indirect question: what it depends on
    pro_a: str  # statement
    pro_b: str  # statement
    when_a: str  # what follows an "if"
    when_b: str

    @property
    def slots(self) -> dict[str, str]:
        return {**self._asdict(), "about": f"the choice between {self.a} and {self.b}"}


Topic = HowTo | Why | Choice


class Domain(NamedTuple):
    name: str
    topics: tuple[Topic, ...]
    mentions: tuple[str, ...]  # sentences with {place} that fit every question of the domain


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
    kinds: tuple[Kind, ...]
    groups: tuple[Group, ...]  # in the order in which an answer says them
    prefaces: tuple[str, ...]  # who asks, besides the prefaces that fit any question
    closings: tuple[str, ...]  # whole sentences; an answer may end with one


T = TypeVar("T", bound=Topic)


def topics(shape: Callable[..., T], text: str) -> tuple[T, ...]:
    """One topic from each block of `text`: its slots in order, parted by bars or line ends, a blank line between."""
    return tuple(shape(*re.split(r"\s*[|\n]\s*", block.strip())) for block in text.strip().split("\n\n"))
