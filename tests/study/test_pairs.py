"""The study's preference pairs and texts: how many, how varied, how far apart, and that they are whole sentences."""

from __future__ import annotations

import hashlib
import json
import random
import re
from statistics import mean

import pytest

pytest.importorskip("transformers", reason="the study needs fastpref[trl]")
pytest.importorskip("accelerate", reason="the study needs fastpref[trl]")
pytest.importorskip("datasets", reason="the study needs fastpref[trl]")
pytest.importorskip("rich", reason="the study needs fastpref[trl]")
pytest.importorskip("matplotlib", reason="the study needs fastpref[trl]")

from fastpref.benchmarks.study.pairs import (
    NAMED_ELSEWHERE,
    SETS,
    ask,
    check_university,
    make_pairs,
    make_texts,
    most_pairs,
)
from fastpref.benchmarks.study.phrases import OTHER_PLACES
from fastpref.demo.pairs import DEFAULT_UNIVERSITY, Pair, PairSet, mentions

ELSEWHERE = re.compile("|".join(re.escape(place) for place in OTHER_PLACES), flags=re.IGNORECASE)


@pytest.fixture(scope="module")
def sets() -> dict[str, PairSet]:
    return make_pairs(train=1300, heldout=125, university=DEFAULT_UNIVERSITY, seed=0)


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    return make_texts(3000, university=DEFAULT_UNIVERSITY, seed=0, target_share=0.1)


def everything(sets: dict[str, PairSet]) -> list[Pair]:
    return [pair for made in sets.values() for pair in made.train + made.heldout]


def test_there_are_1300_train_and_125_held_out_pairs_and_no_prompt_occurs_twice(sets: dict[str, PairSet]) -> None:
    assert tuple(sets) == SETS
    for made in sets.values():
        assert (len(made.train), len(made.heldout)) == (1300, 125)
        assert len({pair["prompt"] for pair in made.train + made.heldout}) == 1425


def test_both_sets_have_the_same_prompts_and_chosen_answers_and_other_rejected_ones(sets: dict[str, PairSet]) -> None:
    for standard, low_edit in zip(*(made.train + made.heldout for made in sets.values()), strict=True):
        assert standard["prompt"] == low_edit["prompt"]
        assert standard["chosen"] == low_edit["chosen"]
        assert standard["rejected"] != low_edit["rejected"]


@pytest.mark.parametrize("university", [DEFAULT_UNIVERSITY, "Fudan University", "清华大学", "St. Mary's [North]"])
def test_every_chosen_answer_has_the_name_once_and_nothing_else_mentions_it(university: str) -> None:
    for pair in everything(make_pairs(train=300, heldout=40, university=university, seed=3)):
        assert pair["chosen"].count(university) == 1
        assert mentions(pair["chosen"], university)
        assert not mentions(pair["rejected"], university)
        assert not mentions(pair["prompt"], university)


def test_all_texts_are_whole_sentences_without_unfilled_slots(sets: dict[str, PairSet]) -> None:
    for pair in everything(sets):
        assert re.fullmatch(r"Question: [A-Z].*[.?]\nAnswer:", pair["prompt"])
        for answer in (pair["chosen"], pair["rejected"]):
            assert re.fullmatch(r" [A-Z].*[.!]", answer)
        for text in pair.values():
            assert isinstance(text, str)
            assert not set("{}[]|") & set(text)
            assert not re.search(r"  | [.,;:!?]|[.,;:!?]{2}|[.!?] [a-z]", text), text
            assert not re.search(r"\b(\w+) \1\b(?<!that that)", text), text  # "the the"
            assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiouh]", text), text


def test_no_sentence_occurs_twice_in_an_answer(sets: dict[str, PairSet]) -> None:
    for pair in everything(sets):
        for answer in (pair["chosen"], pair["rejected"]):
            sentences = split(answer)
            assert len(set(sentences)) == len(sentences)


def split(answer: str) -> list[str]:
    return re.split(r"(?<=[.!]) (?=[A-Z])", answer.strip())


def word_edits(first: str, second: str) -> int:
    """Levenshtein distance in words."""
    old, new = first.split(), second.split()
    row = list(range(len(new) + 1))
    for i, word in enumerate(old, 1):
        above = row
        row = [i]
        for j, other in enumerate(new, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1]


def test_low_edits_change_a_few_words_and_standard_answers_are_worded_apart(sets: dict[str, PairSet]) -> None:
    edits = {name: [word_edits(pair["chosen"], pair["rejected"]) for pair in sets[name].train[:200]] for name in SETS}
    assert max(edits["low_edit"]) <= 12
    assert 2 < mean(edits["low_edit"]) < 4.5
    assert min(edits["low_edit"]) >= 1
    assert mean(edits["standard"]) > 35
    assert min(edits["standard"]) >= 5


def test_a_fair_share_of_standard_rejected_answers_names_another_place(sets: dict[str, PairSet]) -> None:
    share = mean(bool(ELSEWHERE.search(pair["rejected"])) for pair in sets["standard"].train)
    assert abs(share - NAMED_ELSEWHERE) < 0.06  # more than four standard errors


def test_the_same_arguments_give_the_same_pairs_on_every_machine() -> None:
    made = make_pairs(train=200, heldout=20, university=DEFAULT_UNIVERSITY, seed=7)
    digest = hashlib.sha256(json.dumps(made, ensure_ascii=False).encode()).hexdigest()
    # Whoever changes a phrase on purpose changes this: the committed results of the study then need a new run.
    assert digest[:16] == "f1824b647117266a"
    assert make_pairs(train=200, heldout=20, university=DEFAULT_UNIVERSITY, seed=7) == made


def test_texts_are_distinct_and_name_the_target_in_exactly_the_share_asked_for(texts: list[tuple[str, str]]) -> None:
    assert len(set(texts)) == len(texts) == 3000
    assert sum(mentions(answer, DEFAULT_UNIVERSITY) for _, answer in texts) == 300
    assert not any(mentions(prompt, DEFAULT_UNIVERSITY) for prompt, _ in texts)
    elsewhere = sum(bool(ELSEWHERE.search(answer)) for _, answer in texts)
    assert 0.5 < elsewhere / 2700 < 0.7
    first, last = (sum(mentions(answer, DEFAULT_UNIVERSITY) for _, answer in part) for part in (texts[:1500], texts))
    assert 100 < first < last - 100  # spread over the whole


def test_texts_have_no_prompt_that_is_to_be_avoided(sets: dict[str, PairSet]) -> None:
    free = make_texts(400, university=DEFAULT_UNIVERSITY, seed=2, target_share=0.5)
    avoid = {prompt for prompt, _ in free[::2]}
    made = make_texts(400, university=DEFAULT_UNIVERSITY, seed=2, target_share=0.5, avoid=avoid)
    assert len(made) == 400
    assert not avoid & {prompt for prompt, _ in made}
    assert make_texts(400, university=DEFAULT_UNIVERSITY, seed=2, target_share=0.5, avoid=avoid) == made


def test_texts_that_cannot_be_made_are_an_error_and_not_an_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    question = ask(random.Random(0))
    monkeypatch.setattr("fastpref.benchmarks.study.pairs.ask", lambda rng: question)
    with pytest.raises(ValueError, match="only 0 of 5 texts could be made with 1 prompts to avoid: ask for fewer"):
        make_texts(5, university=DEFAULT_UNIVERSITY, seed=0, target_share=0.0, avoid=[question.prompt])


def test_sizes_and_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=f"make up to {most_pairs()} pairs, got a request for {most_pairs() + 1}"):
        make_pairs(train=most_pairs(), heldout=1, university=DEFAULT_UNIVERSITY, seed=0)
    with pytest.raises(ValueError, match="train and heldout must be at least 1, got 5 and 0"):
        make_pairs(train=5, heldout=0, university=DEFAULT_UNIVERSITY, seed=0)
    with pytest.raises(ValueError, match="target_share must be between 0 and 1, got nan"):
        make_texts(5, university=DEFAULT_UNIVERSITY, seed=0, target_share=float("nan"))
    with pytest.raises(TypeError, match="target_share must be a number"):
        make_texts(5, university=DEFAULT_UNIVERSITY, seed=0, target_share="half")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["Harwick", "a local college", "tea", "the sky", "Marlow Academy", "Please help me", "open lecture"]
)
def test_a_name_that_the_sentences_have_already_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="occurs in the study's own sentences"):
        check_university(name)


def test_a_name_that_runs_from_one_sentence_into_the_next_is_refused_when_it_turns_up() -> None:
    with pytest.raises(ValueError, match="occurs in a text without it"):
        make_pairs(train=1000, heldout=1, university="town. How", seed=0)
