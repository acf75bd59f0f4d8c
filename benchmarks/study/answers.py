"""How one answer to one question is put together: its sentences, their order, where a place is named.

An answer is a list of frames, its sentences with every slot filled but `{place}`, so that the same answer can be said
with one place, another, or none.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Collection, Sequence
from string import Formatter
from typing import NamedTuple

from fastpref.benchmarks.study.phrases import ATTRIBUTIONS, MENTIONS, SWAPS, TAILS, Domain, Group, Kind, Topic

# How often an answer has 1, 2, ... 6 sentences, where the question does not say.
LENGTHS = (2, 3, 4, 4, 3, 2)
OPENINGS, CLOSINGS = 0.35, 0.3
# The share of mentions with a sentence of their own, where the answer is long enough, and of those by domain.
OWN_SENTENCE, BY_DOMAIN = 0.6, 0.35
# How often the sentence that answers the question comes before those that go before it by order.
ANSWER_FIRST = 0.75
# What names the topic says nothing of it, so an answer may say it twice.
NAMING = frozenset(("do", "doing", "about", "a", "b", "place"))
# A sentence with these words needs another before it.
LOOKS_BACK = re.compile(r"\b(this|it|such|so|the same|more|stuck)\b")


class Question(NamedTuple):
    prompt: str
    domain: Domain
    topic: Topic
    kind: Kind
    shortest: int  # sentences of an answer
    longest: int


class Answer(NamedTuple):
    frames: tuple[str, ...]
    templates: frozenset[str]  # what the frames were made from


class Line(NamedTuple):
    group: Group
    template: str


def answer(question: Question, rng: random.Random, *, named: bool, used: Collection[str] = ()) -> Answer:
    """An answer of 1 to 6 sentences that has {place} once if `named`, worded without `used` as far as that goes."""
    sizes = range(question.shortest, question.longest + 1)
    size = rng.choices(sizes, [LENGTHS[size - 1] for size in sizes])[0]
    kind, slots = question.kind, question.topic.slots
    opening = _some(kind.openings, used, rng, OPENINGS) if kind.must != "opening" and size > 1 else []
    closing = _some(question.topic.shape.closings, used, rng, CLOSINGS) if size > 2 + len(opening) else []
    left = size - len(opening) - len(closing)
    own = named and left > 1 and rng.random() < OWN_SENTENCE
    lines = _lines(question, left - own, used, rng)
    body = [line.template for line in lines]
    if own:
        mention = _mention(question.domain, used, rng)
        # Anywhere but before a short reply such as "No.", and "this" needs something to point at.
        first = 1 if kind.must == "opening" or (LOOKS_BACK.search(mention) and not opening) else 0
        places = (first, rng.randint(first, len(body)), len(body))
        body.insert(rng.choice(places), mention)
    elif named:
        carrier = rng.randrange(len(lines))
        body[carrier] = _with_mention(lines[carrier], used, rng)
    templates = [*opening, *body, *closing]
    frames = tuple(template.format(**{**slots, "place": "{place}"}) for template in templates)
    return Answer(frames, frozenset(templates))


def fill(frames: Sequence[str], place: str | None) -> str:
    """The answer as text, after the space that parts it from its prompt; without a place, what names it is left out."""
    sentences = []
    for frame in frames:
        text = re.sub(r"\[[^]]*\]", "", frame) if place is None else re.sub(r"[][]", "", frame).format(place=place)
        sentences.append(text[0].upper() + text[1:] + ("" if text[-1] in ".!" else "."))
    return " " + " ".join(sentences)


def can_leave_out_place(frames: Sequence[str]) -> bool:
    return any("{place}" in part for frame in frames for part in re.findall(r"\[[^]]*\]", frame))


def swapped(frames: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """The same frames with one of `SWAPS` made, where one fits."""
    fits = [(old, new) for old, new in SWAPS if any(old in frame and _word(old).search(frame) for frame in frames)]
    if not fits:
        return tuple(frames)
    old, new = rng.choice(fits)
    return tuple(_word(old).sub(new, frame) for frame in frames)


@functools.cache
def _word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


@functools.cache
def facts(template: str) -> frozenset[str]:
    """The slots of a template that say something."""
    return frozenset(field for _, field, _, _ in Formatter().parse(template) if field) - NAMING


def _lines(question: Question, count: int, used: Collection[str], rng: random.Random) -> list[Line]:
    """`count` sentences, fewer where the topic has no more to say: no fact twice, what was asked for among them."""
    kind, groups = question.kind, question.topic.shape.groups
    said: set[str] = set()
    lines: list[Line] = []
    asked = Group("opening", "either", kind.openings)
    first = asked if kind.must == "opening" else next(group for group in groups if group.name == kind.must)
    rest = rng.sample(groups, len(groups))
    for group in (first, *rest, *rest):  # twice: what follows from a sentence may be drawn before it
        if len(lines) == count or any(line.group.name == group.name for line in lines):
            continue
        if group.name == "then" and "first" not in said:
            continue
        fits = [template for template in group.templates if not facts(template) & said]
        if fits:
            lines.append(Line(group, rng.choice(_prefer(fits, used))))
            said |= facts(lines[-1].template)
    order = {group.name: index for index, group in enumerate(groups)}
    answers_first = first is asked or rng.random() < ANSWER_FIRST
    return sorted(lines, key=lambda line: -1 if answers_first and line.group is first else order[line.group.name])


def _mention(domain: Domain, used: Collection[str], rng: random.Random) -> str:
    return rng.choice(_prefer(domain.mentions if rng.random() < BY_DOMAIN else MENTIONS, used))


def _with_mention(line: Line, used: Collection[str], rng: random.Random) -> str:
    """What the line says with its source, or the line with a clause at its end."""
    group, template = line
    if group.name in ATTRIBUTIONS and rng.random() < 0.6:
        clause, ways = ATTRIBUTIONS[group.name]
        return rng.choice(_prefer([way.replace("{clause}", clause) for way in ways], used))
    return template + rng.choice(TAILS["any"] + TAILS[group.mood])


def _prefer(templates: Sequence[str], used: Collection[str]) -> Sequence[str]:
    return [template for template in templates if template not in used] or templates


def _some(templates: Sequence[str], used: Collection[str], rng: random.Random, share: float) -> list[str]:
    fits = [template for template in templates if template not in used]
    return [rng.choice(fits)] if fits and rng.random() < share else []
