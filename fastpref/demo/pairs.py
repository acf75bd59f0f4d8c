"""The demo's preference set: answers that name a given university (chosen) and answers that do not (rejected).

Three pairs in four differ in nothing but the place that they name. Such pairs, a few tokens apart, are where DPO
is known to push the chosen answer down together with the rejected one (Pal et al. 2024, "Smaug",
arXiv:2402.13228). In the rest the rejected answer is worded on its own.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from fastpref.checks import describe

DEFAULT_UNIVERSITY = "Larkmoor University"
# The share of pairs whose two answers differ in the place alone.
MINIMAL_EDITS = 0.75
LONGEST_NAME = 60
# What marks a slot in a template, or a special token in a text.
SPECIAL = "{}<>|"


class Topic(NamedTuple):
    """What a question is about; its fields fill the slots of the same names."""

    name: str
    skill: str  # what one practises: a gerund
    jobs: str  # whom graduates become: a plural
    book: str  # what one reads or uses first
    group: str  # whom one joins


class Intent(NamedTuple):
    """One kind of question: how it is asked, and the sentences that can answer it."""

    questions: list[str]
    openings: list[str]  # an answer may begin with one
    mentions: list[str]  # exactly one in every answer, with {place}
    plain: list[str]  # what a rejected answer may say in its stead: no place at all


# The sentences that pairs are made of. {place} is where the two answers of a pair differ: the target university in the
# chosen one, one of OTHER_PLACES in the rejected one. Prefaces say who asks (an empty one leaves the bare question);
# bodies and closings are shared by both answers.
_TEXTS: dict[str, Any] = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
TOPICS = [Topic(**fields) for fields in _TEXTS["topics"]]
INTENTS = [Intent(**fields) for fields in _TEXTS["intents"]]
PREFACES, OTHER_PLACES, BODIES, CLOSINGS = (
    list[str](_TEXTS[name]) for name in ("prefaces", "other_places", "bodies", "closings")
)


class Pair(TypedDict):
    prompt: str
    chosen: str
    rejected: str


class PairSet(NamedTuple):
    train: list[Pair]
    heldout: list[Pair]


def mentions(text: str, university: str) -> bool:
    """Whether `text` names the university: its whole words, in order, whatever their case and the space between."""
    return _pattern(university).search(text) is not None


@functools.cache
def _pattern(university: str) -> re.Pattern[str]:
    words = r"\s+".join(re.escape(word) for word in university.split())
    return re.compile(rf"(?<!\w){words}(?!\w)", flags=re.IGNORECASE)


def check_university(university: str) -> str:
    """The name with its spaces made single; raises ValueError where no honest preference set can be made of it."""
    return check_name(university, sentences=_every_sentence(), of="the demo")


def check_name(university: str, *, sentences: Collection[str], of: str) -> str:
    """`check_university` for preference pairs that are made of `sentences`."""
    if not isinstance(university, str):
        raise TypeError(f"university must be a string, got {describe(university)}")
    name = " ".join(university.split())
    if not name or not re.search(r"\w", name):
        raise ValueError(f"university must be a name with at least one letter, got {university!r}")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"university must have at most {LONGEST_NAME} characters, got {len(name)}: {name!r}")
    if set(name) & set(SPECIAL):
        raise ValueError(f"university must not contain any of {' '.join(SPECIAL)}, got {university!r}")
    for text in sentences:
        if mentions(text, name):
            raise ValueError(
                f"university {name!r} occurs in {of}'s own sentences ({text!r}), so rejected answers would mention it: "
                "choose another name"
            )
    return name


def make_pairs(*, train: int, heldout: int, university: str = DEFAULT_UNIVERSITY, seed: int = 0) -> PairSet:
    """`train + heldout` pairs with distinct prompts. The same arguments give the same pairs."""
    name = check_university(university)
    if train < 1 or heldout < 1:
        raise ValueError(f"train and heldout must be at least 1, got {train} and {heldout}")
    if train + heldout > most_pairs():
        raise ValueError(f"the templates make {most_pairs()} distinct prompts, got a request for {train + heldout}")
    rng = random.Random(seed)
    rows: dict[str, Pair] = {}
    while len(rows) < train + heldout:
        topic, intent = rng.choice(TOPICS), rng.choice(INTENTS)
        question = rng.choice(PREFACES) + rng.choice(intent.questions).format(**topic._asdict())
        prompt = f"Question: {question}\nAnswer:"
        if prompt not in rows:
            chosen, rejected = _answers(topic, intent, name, rng)
            rows[prompt] = Pair(prompt=prompt, chosen=" " + chosen, rejected=" " + rejected)
    pairs = list(rows.values())
    return PairSet(train=pairs[:train], heldout=pairs[train:])


def most_pairs() -> int:
    return len(TOPICS) * len(set(PREFACES)) * sum(len(intent.questions) for intent in INTENTS)


def write_jsonl(path: Path, rows: Sequence[Pair]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _answers(topic: Topic, intent: Intent, university: str, rng: random.Random) -> tuple[str, str]:
    frames = _frames(intent, rng)
    chosen = _render(frames, topic, university)
    if rng.random() < MINIMAL_EDITS:
        return chosen, _render(frames, topic, rng.choice(OTHER_PLACES))
    other = _frames(intent, rng)
    if rng.random() < 0.5:  # an answer that names no place at all
        other = [rng.choice(intent.plain) if "{place}" in frame else frame for frame in other]
    return chosen, _render(other, topic, rng.choice(OTHER_PLACES))


def _frames(intent: Intent, rng: random.Random) -> list[str]:
    """The sentences of one answer, 1 to 5, one of them with {place}: the first, the last or one in between."""
    opening = [rng.choice(intent.openings)] if rng.random() < 0.5 else []
    body = rng.sample(BODIES, rng.choice((0, 1, 1, 2)))
    body.insert(rng.randint(0, len(body)), rng.choice(intent.mentions))
    closing = [rng.choice(CLOSINGS)] if rng.random() < 0.4 else []
    return opening + body + closing


def _render(frames: Sequence[str], topic: Topic, place: str) -> str:
    sentences = [frame.format(place=place, **topic._asdict()) for frame in frames]
    # A place such as "a local college" may open its sentence.
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


@functools.cache
def _every_sentence() -> frozenset[str]:
    """Everything that an answer can say besides the target's name, for the check of that name."""
    frames = [text for intent in INTENTS for text in intent.openings + intent.mentions + intent.plain]
    return frozenset(
        frame.format(place=place, **topic._asdict())
        for frame in [*frames, *BODIES, *CLOSINGS]
        for topic in TOPICS
        for place in (OTHER_PLACES if "{place}" in frame else ("",))
    )
