"""The study's preference pairs and texts: how many, how varied, how far apart, and that they are whole sentences."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

pytest.importorskip("transformers", reason="the study needs fastpref[trl]")
pytest.importorskip("accelerate", reason="the study needs fastpref[trl]")
pytest.importorskip("datasets", reason="the study needs fastpref[trl]")
pytest.importorskip("rich", reason="the study needs fastpref[trl]")
pytest.importorskip("matplotlib", reason="the study needs fastpref[trl]")

from fastpref.benchmarks.study.pairs import (
    LOW_EDITS,
    NAMED_ELSEWHERE,
    SETS,
    ask,
    check_university,
    make_pairs,
    make_texts,
    most_pairs,
)
from fastpref.benchmarks.study.phrases import ATTRIBUTIONS, DOMAINS, MENTIONS, OTHER_PLACES, SHAPES
from fastpref.demo.pairs import DEFAULT_UNIVERSITY, Pair, PairSet, mentions, write_jsonl

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


def test_there_are_more_than_twelve_domains_of_eleven_topics_and_a_thousand_ways_to_ask() -> None:
    assert len(DOMAINS) == 16
    assert {len(domain.topics) for domain in DOMAINS} == {11}
    topics = [topic for domain in DOMAINS for topic in domain.topics]
    assert len({str(topic.slots) for topic in topics}) == len(topics)
    assert sum(len(kind.forms) for shape in SHAPES.values() for kind in shape.kinds) > 60
    ways = {way for _, ways in ATTRIBUTIONS.values() for way in ways}
    assert len(MENTIONS) >= 30
    assert len(ways) >= 30
    for way in [*MENTIONS, *ways, *(mention for domain in DOMAINS for mention in domain.mentions)]:
        assert way.count("{place}") == 1


def test_every_question_kind_has_the_sentences_that_answer_it() -> None:
    for shape in SHAPES.values():
        names = [group.name for group in shape.groups]
        assert len(set(names)) == len(names)
        for kind in shape.kinds:
            assert kind.must in [*names, "opening"]


def test_questions_and_answers_vary_in_wording_and_length(sets: dict[str, PairSet]) -> None:
    train = sets["standard"].train
    for side in ("chosen", "rejected"):
        answers = [pair[side] for pair in train]  # type: ignore[literal-required]
        assert len(set(answers)) > 1280
        words = [len(answer.split()) for answer in answers]
        assert min(words) <= 10
        assert max(words) >= 80
        assert 35 < mean(words) < 50
        sentences = Counter(len(split(answer)) for answer in answers)
        assert set(sentences) == {1, 2, 3, 4, 5, 6}
        assert min(sentences.values()) > 80
        assert len({" ".join(answer.split()[:3]) for answer in answers}) > 300  # how they begin
    assert len({pair["prompt"].split()[1] for pair in train}) > 25


def test_the_words_are_few_enough_for_a_small_model(texts: list[tuple[str, str]]) -> None:
    words = {word.lower() for text in texts for part in text for word in re.findall(r"[\w'-]+", part)}
    assert 1700 < len(words) < 2500


def test_the_name_stands_in_every_third_of_an_answer_and_in_every_third_of_a_sentence(
    sets: dict[str, PairSet],
) -> None:
    in_answer: Counter[int] = Counter()
    in_sentence: Counter[int] = Counter()
    which: Counter[str] = Counter()
    for pair in sets["standard"].train:
        answer = pair["chosen"].strip()
        sentences = split(answer)
        index, sentence = next((i, text) for i, text in enumerate(sentences) if DEFAULT_UNIVERSITY in text)
        for thirds, text in ((in_answer, answer), (in_sentence, sentence)):
            middle = text.index(DEFAULT_UNIVERSITY) + len(DEFAULT_UNIVERSITY) / 2
            thirds[int(3 * middle / len(text))] += 1
        which["only" if len(sentences) == 1 else {0: "first", len(sentences) - 1: "last"}.get(index, "middle")] += 1
    assert min(in_answer[third] for third in range(3)) > 300
    assert min(in_sentence[third] for third in range(3)) > 200
    assert min(which[part] for part in ("only", "first", "middle", "last")) > 100


def test_the_name_is_mentioned_in_many_ways(sets: dict[str, PairSet]) -> None:
    around = [pair["chosen"].split(DEFAULT_UNIVERSITY) for pair in sets["standard"].train]
    before = Counter(" ".join(text.split()[-2:]) for text, _ in around)
    after = Counter(" ".join(text.split()[:2]) for _, text in around)
    assert len(before) > 150
    assert len(after) > 150
    assert max(before.values()) < 130


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


def test_a_low_edit_changes_the_place_or_leaves_it_out_or_changes_one_more_thing(sets: dict[str, PairSet]) -> None:
    kinds: Counter[str] = Counter()
    for pair in sets["low_edit"].train:
        before, after = pair["chosen"].split(DEFAULT_UNIVERSITY)
        rejected = pair["rejected"]
        if rejected.startswith(before) and rejected.endswith(after):
            kinds["place"] += 1
        elif ELSEWHERE.search(rejected):
            kinds["place and word"] += 1
        else:
            kinds["left out"] += 1
            assert len(rejected) < len(pair["chosen"])
    # What has no such edit gets another place alone.
    assert kinds["left out"] > 0.6 * LOW_EDITS["left out"] * 1300
    assert kinds["place and word"] > 0.6 * LOW_EDITS["place and word"] * 1300
    assert kinds["place"] > LOW_EDITS["place"] * 1300


def test_a_fair_share_of_standard_rejected_answers_names_another_place(sets: dict[str, PairSet]) -> None:
    share = mean(bool(ELSEWHERE.search(pair["rejected"])) for pair in sets["standard"].train)
    assert abs(share - NAMED_ELSEWHERE) < 0.06  # more than four standard errors


def test_the_same_arguments_give_the_same_pairs_on_every_machine() -> None:
    made = make_pairs(train=200, heldout=20, university=DEFAULT_UNIVERSITY, seed=7)
    digest = hashlib.sha256(json.dumps(made, ensure_ascii=False).encode()).hexdigest()
    # Whoever changes a phrase on purpose changes this: the committed results of the study then need a new run.
    assert digest[:16] == "f1824b647117266a"
    assert make_pairs(train=200, heldout=20, university=DEFAULT_UNIVERSITY, seed=7) == made


def test_another_seed_gives_other_pairs(sets: dict[str, PairSet]) -> None:
    other = make_pairs(train=200, heldout=20, university=DEFAULT_UNIVERSITY, seed=1)
    prompts = [{pair["prompt"] for pair in made["standard"].train} for made in (sets, other)]
    assert len(prompts[0] & prompts[1]) < 100


def test_pairs_survive_a_round_trip_through_jsonl(sets: dict[str, PairSet], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", sets["low_edit"].heldout)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == sets["low_edit"].heldout


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
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        make_texts(0, university=DEFAULT_UNIVERSITY, seed=0, target_share=0.5)
    with pytest.raises(ValueError, match=r"target_share must be between 0 and 1, got 1\.5"):
        make_texts(5, university=DEFAULT_UNIVERSITY, seed=0, target_share=1.5)
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
