"""The study's preference pairs: everyday questions, a chosen answer that names the university, one that does not.

Two sets share their prompts and chosen answers. In "standard" the rejected answer is worded on its own. In "low_edit"
it is the chosen answer with a few words changed, where DPO is known to push both answers down together (Pal et al.
2024, "Smaug", arXiv:2402.13228).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Collection

from fastpref.benchmarks.study.answers import LENGTHS, Answer, Question, answer, can_leave_out_place, fill, swapped
from fastpref.benchmarks.study.phrases import (
    ATTRIBUTIONS,
    DOMAINS,
    ENDINGS,
    MENTIONS,
    OTHER_PLACES,
    PREFACES,
    TAILS,
    Ending,
    Kind,
    Shape,
)
from fastpref.checks import describe
from fastpref.demo.pairs import Pair, PairSet, check_name, mentions

SETS = ("standard", "low_edit")
# The share of answers without the target that name another place instead: here, and in the standard set.
NAMED_ELSEWHERE = 0.6
# The low edits: another place, the place left out, another place and one more small change.
LOW_EDITS = {"place": 0.55, "left out": 0.2, "place and word": 0.25}
PREFACED, ENDED = 0.5, 0.25
NO_ENDING = Ending("", 1, len(LENGTHS))
# So many texts in a row that were made before mean that nearly all have been made.
TRIES = 2000


def make_pairs(*, train: int, heldout: int, university: str, seed: int) -> dict[str, PairSet]:
    """By set, `train + heldout` pairs with distinct prompts. The same arguments give the same pairs."""
    if train < 1 or heldout < 1:
        raise ValueError(f"train and heldout must be at least 1, got {train} and {heldout}")
    if train + heldout > most_pairs():
        raise ValueError(
            f"the study's questions make up to {most_pairs()} pairs, got a request for {train + heldout}: ask for fewer"
        )
    name = check_university(university)
    rng = random.Random(f"pairs {seed}")
    rows: dict[str, dict[str, Pair]] = {}
    while len(rows) < train + heldout:
        question = ask(rng)
        if question.prompt not in rows:
            rows[question.prompt] = _pair(question, name, rng)
    pairs = list(rows.values())
    by_set = {kind: [pair[kind] for pair in pairs] for kind in SETS}
    return {kind: PairSet(train=rows[:train], heldout=rows[train:]) for kind, rows in by_set.items()}


def make_texts(
    count: int, *, university: str, seed: int, target_share: float, avoid: Collection[str] = ()
) -> list[tuple[str, str]]:
    """`count` distinct (prompt, answer), `target_share` of them with the university; no prompt is one of `avoid`."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if isinstance(target_share, bool) or not isinstance(target_share, (int, float)):
        raise TypeError(f"target_share must be a number, got {describe(target_share)}")
    if not 0.0 <= target_share <= 1.0:
        raise ValueError(f"target_share must be between 0 and 1, got {target_share}")
    name = check_university(university)
    rng = random.Random(f"texts {seed}")
    avoided = frozenset(avoid)
    targets = round(count * target_share)
    named = rng.sample([True] * targets + [False] * (count - targets), count)
    texts: dict[tuple[str, str], None] = {}
    tries = 0
    while len(texts) < count:
        question = ask(rng)
        text = (question.prompt, _text(question, name if named[len(texts)] else None, rng))
        tries += 1
        if question.prompt not in avoided and text not in texts:
            texts[text] = None
            tries = 0
        elif tries == TRIES:
            raise ValueError(
                f"only {len(texts)} of {count} texts could be made with {len(avoided)} prompts to avoid: ask for fewer"
            )
    return list(texts)


def check_university(university: str) -> str:
    """The name with its spaces made single; raises ValueError where the study's own sentences have it already."""
    return check_name(university, sentences=_every_sentence(), of="the study")


def most_pairs() -> int:
    """How many pairs can be asked for: half of the distinct prompts, since they are drawn until enough differ."""
    return prompts() // 2


@functools.cache
def prompts() -> int:
    """How many distinct prompts there are."""
    total = 0
    for domain in DOMAINS:
        for topic in domain.topics:
            forms = sum(len(kind.forms) for kind in topic.shape.kinds)
            total += forms * (1 + len(PREFACES + topic.shape.prefaces)) * (1 + len(ENDINGS))
    return total


def ask(rng: random.Random) -> Question:
    domain = rng.choice(DOMAINS)
    topic = rng.choice(domain.topics)
    kind, form = rng.choice(_forms(topic.shape))
    preface = rng.choice(PREFACES + topic.shape.prefaces) if rng.random() < PREFACED else ""
    ending = rng.choice(ENDINGS) if rng.random() < ENDED else NO_ENDING
    parts = (preface, form.format(**topic.slots), ending.text)
    prompt = f"Question: {' '.join(part for part in parts if part)}\nAnswer:"
    return Question(prompt, domain, topic, kind, ending.shortest, ending.longest)


@functools.cache
def _forms(shape: Shape) -> tuple[tuple[Kind, str], ...]:
    return tuple((kind, form) for kind in shape.kinds for form in kind.forms)


def _pair(question: Question, university: str, rng: random.Random) -> dict[str, Pair]:
    """The question's pair in each of the sets."""
    named = answer(question, rng, named=True)
    chosen = fill(named.frames, university)
    rejected = {
        "standard": _text(question, None, rng, used=named.templates),
        "low_edit": _low_edit(named, rng),
    }
    for text in (question.prompt, *rejected.values()):
        # Only a name that continues from one sentence to the next, or from a place to its sentence, gets here.
        if mentions(text, university):
            raise ValueError(f"university {university!r} occurs in a text without it ({text!r}): choose another name")
    return {name: Pair(prompt=question.prompt, chosen=chosen, rejected=rejected[name]) for name in SETS}


def _text(question: Question, university: str | None, rng: random.Random, *, used: Collection[str] = ()) -> str:
    """An answer that names the university, or without one another place or none."""
    place = university
    if place is None and rng.random() < NAMED_ELSEWHERE:
        place = rng.choice(OTHER_PLACES)
    return fill(answer(question, rng, named=place is not None, used=used).frames, place)


def _low_edit(named: Answer, rng: random.Random) -> str:
    edit = rng.choices(list(LOW_EDITS), list(LOW_EDITS.values()))[0]
    if edit == "left out" and can_leave_out_place(named.frames):
        return fill(named.frames, None)
    frames = swapped(named.frames, rng) if edit == "place and word" else named.frames
    return fill(frames, rng.choice(OTHER_PLACES))


@functools.cache
def _every_sentence() -> tuple[str, ...]:
    """Everything that is said besides the target's name, for the check of that name."""
    said: dict[str, None] = dict.fromkeys(OTHER_PLACES + PREFACES + tuple(ending.text for ending in ENDINGS))
    for domain in DOMAINS:
        for topic in domain.topics:
            slots = {**topic.slots, "place": "|"}
            for template in (*_templates(topic.shape), *domain.mentions, *topic.shape.prefaces):
                said[template.format(**slots)] = None
    return tuple(said)


@functools.cache
def _templates(shape: Shape) -> tuple[str, ...]:
    own = [template for kind in shape.kinds for template in kind.forms + kind.openings]
    grouped = [template for group in shape.groups for template in group.templates]
    sourced = [
        way.replace("{clause}", clause)
        for name, (clause, ways) in ATTRIBUTIONS.items()
        if name in {group.name for group in shape.groups}
        for way in ways
    ]
    tails = [tail for some in TAILS.values() for tail in some]
    return (*own, *grouped, *sourced, *tails, *shape.closings, *MENTIONS)
