"""Formats, tokenisation, the border, truncation and what is dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpref.training.data.formats import read_row
from fastpref.training.data.templates import DEFAULT_CHAT_TEMPLATE
from fastpref.training.data.tokens import Pair, Response, tokenize_rows

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

Row = dict[str, Any]


def one(row: Row, tokenizer: Any, max_length: int = 64) -> Pair:
    return tokenize_rows([row], tokenizer, max_length=max_length).pairs[0]


def scored(response: Response, tokenizer: Any) -> str:
    return tokenizer.decode(response.ids[response.start :].tolist())


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def test_only_the_response_and_one_eos_are_scored(tokenizer: Any) -> None:
    pair = one({"prompt": "the sky is", "chosen": " blue", "rejected": " green today"}, tokenizer)
    assert tokenizer.decode(pair.prompt.tolist()) == "the sky is"
    assert scored(pair.chosen, tokenizer) == " blue<|end|>"
    assert scored(pair.rejected, tokenizer) == " green today<|end|>"
    assert tokenizer.decode(pair.chosen.ids.tolist()) == "the sky is blue<|end|>"


def test_an_eos_that_is_there_is_not_doubled(tokenizer: Any) -> None:
    pair = one({"prompt": "a", "chosen": " blue<|end|>", "rejected": " green"}, tokenizer)
    assert scored(pair.chosen, tokenizer) == " blue<|end|>"
    assert scored(pair.rejected, tokenizer) == " green<|end|>"


def test_an_eos_that_the_tokenizer_adds_is_not_doubled_and_not_part_of_the_prompt(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(adds="$A <|end|>")
    pair = one({"prompt": "the sky", "chosen": " is", "rejected": ""}, tokenizer)
    assert tokenizer.decode(pair.prompt.tolist()) == "the sky"
    assert scored(pair.chosen, tokenizer) == " is<|end|>"
    assert scored(pair.rejected, tokenizer) == "<|end|>"


def test_a_response_that_is_a_prefix_of_the_other_is_told_apart_by_its_eos(tokenizer: Any) -> None:
    pair = one({"prompt": "the sky is", "chosen": " blue", "rejected": " blue today"}, tokenizer)
    assert scored(pair.chosen, tokenizer) == " blue<|end|>"
    assert scored(pair.rejected, tokenizer) == " blue today<|end|>"


def test_a_token_across_the_border_belongs_to_the_response(tokenizer: Any) -> None:
    joined = tokenizer("the sky")["input_ids"]
    assert tokenizer("the sk")["input_ids"][: len(joined)] != joined  # " sky" is one token: the test has its case
    pair = one({"prompt": "the sk", "chosen": "y is blue", "rejected": "i"}, tokenizer)
    assert scored(pair.chosen, tokenizer) == " sky is blue<|end|>"
    assert tokenizer.decode(pair.chosen.ids.tolist()) == "the sky is blue<|end|>"
    assert tokenizer.decode(pair.prompt.tolist()) == "the"


def test_equal_responses_are_allowed(tokenizer: Any) -> None:
    pair = one({"prompt": "the", "chosen": " sky", "rejected": " sky"}, tokenizer)
    assert pair.chosen.ids.tolist() == pair.rejected.ids.tolist()
    assert pair.chosen.start == pair.rejected.start == 1


def test_an_empty_response_scores_its_eos(tokenizer: Any) -> None:
    pair = one({"prompt": "the sky", "chosen": "", "rejected": " is"}, tokenizer)
    assert scored(pair.chosen, tokenizer) == "<|end|>"


def test_a_response_without_any_token_is_dropped_and_counted(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(eos_token=None)
    rows = [{"prompt": "the sky", "chosen": c, "rejected": " is"} for c in (" is", "", " blue")]
    result = tokenize_rows(rows, tokenizer, max_length=64, name="dataset")
    assert [pair.row for pair in result.pairs] == [0, 2]
    assert result.empty == [1]
    assert "dataset: dropped 1 rows with a response of no tokens: 1" in result.report("dataset", 64)


def test_without_bos_none_is_added(tokenizer: Any) -> None:
    assert tokenizer.bos_token_id is None
    assert (
        one({"prompt": "the", "chosen": " sky", "rejected": " is"}, tokenizer).chosen.ids[0]
        == tokenizer("the")["input_ids"][0]
    )


@pytest.mark.parametrize("prompt", ["the sky", "<s>the sky"])
def test_a_bos_that_the_tokenizer_adds_stands_once(make_tokenizer: Any, prompt: str) -> None:
    tokenizer = make_tokenizer(bos="<s>", adds="<s> $A")
    pair = one({"prompt": prompt, "chosen": " is", "rejected": " blue"}, tokenizer)
    assert tokenizer.decode(pair.chosen.ids.tolist()) == "<s>the sky is<|end|>"
    assert scored(pair.chosen, tokenizer) == " is<|end|>"


def test_a_template_that_writes_the_bos_gets_no_second_one(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(bos="<s>", adds="<s> $A")
    tokenizer.chat_template = "<s>" + DEFAULT_CHAT_TEMPLATE
    pair = one({"prompt": [user("ask")], "chosen": [assistant("x")], "rejected": [assistant("y")]}, tokenizer)
    assert tokenizer.decode(pair.chosen.ids.tolist()) == "<s>User: ask\n\nAssistant: x<|end|>"


def test_of_a_conversation_only_the_last_turn_is_scored(tokenizer: Any) -> None:
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    prompt = [{"role": "system", "content": "be brief"}, user("ask"), assistant("no"), user("again")]
    pair = one({"prompt": prompt, "chosen": [assistant("blue")], "rejected": [assistant("green")]}, tokenizer, 128)
    text = "System: be brief\n\nUser: ask\n\nAssistant: no<|end|>\n\nUser: again\n\nAssistant:"
    assert tokenizer.decode(pair.prompt.tolist()) == text
    assert scored(pair.chosen, tokenizer) == " blue<|end|>"
    assert scored(pair.rejected, tokenizer) == " green<|end|>"


def test_an_implicit_prompt_of_messages_is_what_both_responses_start_with(tokenizer: Any) -> None:
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    shared = [user("ask"), assistant("no"), user("again")]
    explicit = one({"prompt": shared, "chosen": [assistant("a")], "rejected": [assistant("b")]}, tokenizer, 128)
    implicit = one({"chosen": [*shared, assistant("a")], "rejected": [*shared, assistant("b")]}, tokenizer, 128)
    for name in ("chosen", "rejected"):
        assert getattr(implicit, name).ids.tolist() == getattr(explicit, name).ids.tolist()
        assert getattr(implicit, name).start == getattr(explicit, name).start


def test_with_equal_messages_the_implicit_prompt_leaves_the_last_one_as_response(tokenizer: Any) -> None:
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    messages = [user("ask"), assistant("same")]
    pair = one({"chosen": messages, "rejected": messages}, tokenizer)
    assert scored(pair.chosen, tokenizer) == scored(pair.rejected, tokenizer) == " same<|end|>"


def test_an_implicit_prompt_of_text_is_the_common_start(tokenizer: Any) -> None:
    pair = one({"chosen": "the sky is blue", "rejected": "the sky is green"}, tokenizer)
    assert scored(pair.chosen, tokenizer) == " blue<|end|>"
    assert scored(pair.rejected, tokenizer) == " green<|end|>"


def test_turns_of_others_in_a_response_are_reported(tokenizer: Any) -> None:
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b"), user("c"), assistant("d")]}
    result = tokenize_rows([row], tokenizer, max_length=64)
    assert scored(result.pairs[0].rejected, tokenizer) == " b<|end|>\n\nUser: c\n\nAssistant: d<|end|>"
    assert any(
        "in all rows a response has turns other than the assistant's" in line for line in result.report("dataset", 64)
    )


def test_max_length_cuts_the_end_of_a_response_and_is_reported(tokenizer: Any) -> None:
    row = {"prompt": "the sky", "chosen": " is blue" * 9, "rejected": " no"}
    whole, cut = one(row, tokenizer), tokenize_rows([row], tokenizer, max_length=7)
    assert cut.pairs[0].chosen.ids.tolist() == whole.chosen.ids[:7].tolist()
    assert cut.pairs[0].chosen.start == whole.chosen.start
    assert cut.truncated == 1
    assert "dataset: cut the end of 1 responses to fit max_length=7" in cut.report("dataset", 7)


def test_a_prompt_that_leaves_no_room_is_dropped_counted_and_reported(tokenizer: Any) -> None:
    prompt = "the sky is blue today"
    length = len(tokenizer(prompt)["input_ids"])
    rows = [
        {"prompt": "the", "chosen": " sky", "rejected": " is"},
        {"prompt": prompt, "chosen": " a", "rejected": " b"},
    ]
    kept = tokenize_rows(rows, tokenizer, max_length=length + 1)
    assert [len(pair.chosen.ids) - pair.chosen.start for pair in kept.pairs] == [2, 1]
    result = tokenize_rows(rows, tokenizer, max_length=length)
    assert ([pair.row for pair in result.pairs], result.no_room) == ([0], [1])
    assert any(
        f"dropped 1 rows whose prompt leaves no room for a response within max_length={length}: 1" in line
        for line in result.report("dataset", length)
    )
    with pytest.raises(ValueError, match=r"dataset holds no pair to train on.*dropped 1 rows whose prompt"):
        tokenize_rows(rows[1:], tokenizer, max_length=length)


def test_chinese_text_goes_through_and_back(tokenizer: Any) -> None:
    pair = one({"prompt": "天空是什么颜色？", "chosen": "蓝色。", "rejected": "蓝色的，也许。"}, tokenizer, 128)
    assert tokenizer.decode(pair.prompt.tolist()) == "天空是什么颜色？"
    assert tokenizer.decode(pair.chosen.ids.tolist()) == "天空是什么颜色？蓝色。<|end|>"
    assert scored(pair.rejected, tokenizer).endswith("也许。<|end|>")


TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}
TALK = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ("text", TypeError, "row 1 must be a dict with prompt, chosen and rejected, got 'text'"),
        ({"prompt": "a", "chosen": "b"}, ValueError, "row 1 has no 'rejected'; its columns are prompt, chosen"),
        ({}, ValueError, "row 1 has no 'chosen'; its columns are none"),
        ({**TEXT, "chosen": 3}, TypeError, "row 1: chosen must be a string or a list of messages, got 3"),
        (
            {**TEXT, "chosen": [assistant("b")]},
            TypeError,
            "row 1 mixes text and messages (chosen is messages, rejected is text",
        ),
        ({**TALK, "prompt": []}, ValueError, "row 1: prompt is an empty list of messages"),
        ({**TALK, "chosen": ["b"]}, TypeError, "row 1: chosen[0] must be a dict with 'role' and 'content', got 'b'"),
        (
            {**TALK, "chosen": [{"role": "assistant"}]},
            TypeError,
            "row 1: chosen[0]['content'] must be a string or a list of text parts, got None",
        ),
        (
            {**TALK, "chosen": [user("b")]},
            ValueError,
            "row 1: chosen must start with an 'assistant' message, got a 'user'",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("z"), assistant("b")]},
            ValueError,
            "row 1 has no prompt, and its chosen and rejected messages do not start with one",
        ),
        ({**TALK, "images": [{}]}, ValueError, "row 1 has a column 'images': images are not supported"),
        (
            {**TEXT, "ref_chosen_logps": -1.0},
            TypeError,
            "row 1: ref_chosen_logps and ref_rejected_logps must both be numbers",
        ),
        (
            {**TEXT, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
            ValueError,
            "row 1 differs in form from row 0",
        ),
        (TALK, ValueError, "row 1 differs in form from row 0: all rows must be text or all messages"),
    ],
)
def test_a_bad_row_is_named(row: Any, error: type[Exception], message: str, tokenizer: Any) -> None:
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    with pytest.raises(error) as raised:
        tokenize_rows([TEXT, row], tokenizer, max_length=64)
    assert message in str(raised.value)


def lines_of(rows: list[Any], tokenizer: Any, max_length: int = 128) -> list[str]:
    return tokenize_rows(rows, tokenizer, max_length=max_length).report("dataset", max_length)


def same(tokenizer: Any, row: Row, as_if: Row) -> None:
    """The row is trained on as if it were the other."""
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    got, wanted = (one(each, tokenizer, 256) for each in (row, as_if))
    for name in ("chosen", "rejected"):
        assert getattr(got, name).ids.tolist() == getattr(wanted, name).ids.tolist()
        assert getattr(got, name).start == getattr(wanted, name).start


ANSWERS = {"chosen": "blue", "rejected": "green"}
TURNS = {"chosen": [assistant("blue")], "rejected": [assistant("green")]}


@pytest.mark.parametrize(
    ("row", "prompt", "said"),
    [
        ({"question": "sky?"}, [user("sky?")], "question and the responses are put into messages"),
        (
            {"system": "be brief", "question": "sky?"},
            [{"role": "system", "content": "be brief"}, user("sky?")],
            "system and question and the responses are put into messages",
        ),
        ({"system": "", "question": "sky?"}, [user("sky?")], "system and question"),
        ({"system": None, "prompt": "sky?"}, [user("sky?")], "system and prompt"),
        (
            {"system": "be brief", "prompt": "sky?"},
            [{"role": "system", "content": "be brief"}, user("sky?")],
            "system and prompt",
        ),
        ({"instruction": "say", "input": "sky"}, [user("say\nsky")], "instruction and input and the responses"),
        ({"instruction": "say", "input": ""}, [user("say")], "instruction and the responses"),
        ({"input": "sky?"}, [user("sky?")], "input and the responses"),
        ({"prompt": [user("sky?")]}, [user("sky?")], "prompt and the responses"),
    ],
)
def test_a_question_in_another_column_is_the_prompt(row: Row, prompt: list[Row], said: str, tokenizer: Any) -> None:
    same(tokenizer, {**row, **ANSWERS}, {"prompt": prompt, **TURNS})
    assert any(f"dataset: in all rows {said}" in line for line in lines_of([{**row, **ANSWERS}], tokenizer))


def test_a_system_column_beside_messages_is_their_first(tokenizer: Any) -> None:
    system = {"role": "system", "content": "be brief"}
    same(
        tokenizer,
        {"system": "be brief", "prompt": [user("a")], **TURNS},
        {"prompt": [system, user("a")], **TURNS},
    )
    same(
        tokenizer,
        {"system": "be brief", "prompt": [system, user("a")], **TURNS},
        {"prompt": [system, user("a")], **TURNS},
    )
    whole = {name: [user("a"), *messages] for name, messages in TURNS.items()}
    same(tokenizer, {"system": "be brief", **whole}, {"prompt": [system, user("a")], **TURNS})


def test_a_text_prompt_beside_whole_conversations_is_their_first_message(tokenizer: Any) -> None:
    """As HuggingFaceH4/ultrafeedback_binarized has it."""
    whole = {name: [user("sky?"), *messages] for name, messages in TURNS.items()}
    same(tokenizer, {"prompt": "sky?", **whole}, {"prompt": [user("sky?")], **TURNS})
    same(tokenizer, {"prompt": "sky?", **TURNS}, {"prompt": [user("sky?")], **TURNS})
    lines = lines_of([{"prompt": "sky?", **whole}, {"prompt": "sea?", **whole}, {"prompt": "sky?", **TURNS}], tokenizer)
    assert any("in 1 rows (2) the text of prompt is put into a user's message" in line for line in lines)
    assert any("in 1 rows (0) the text of prompt is a message of the whole conv" in line for line in lines)
    assert any("in 1 rows (1) the text of prompt is left out, as no message says it" in line for line in lines)


def test_a_prompt_that_both_responses_repeat_is_taken_once(tokenizer: Any) -> None:
    row = {"prompt": "sky?", "chosen": "sky? blue", "rejected": "sky? green"}
    same(tokenizer, row, {"prompt": "sky?", "chosen": " blue", "rejected": " green"})
    assert any("in all rows both responses begin with the prompt" in line for line in lines_of([row], tokenizer))
    same(tokenizer, {**row, "system": "s"}, {"prompt": "sky?", "system": "s", "chosen": " blue", "rejected": " green"})
    messages = {"prompt": [user("a")], **{name: [user("a"), *turn] for name, turn in TURNS.items()}}
    same(tokenizer, messages, {"prompt": [user("a")], **TURNS})


def test_a_prompt_that_only_some_responses_repeat_is_left_and_counted(tokenizer: Any) -> None:
    rows = [{"prompt": "sky?", "chosen": "sky? blue", "rejected": "sky? green"}, TEXT]
    result = tokenize_rows(rows, tokenizer, max_length=64)
    assert tokenizer.decode(result.pairs[0].chosen.ids.tolist()) == "sky?sky? blue<|end|>"
    assert any("in 1 rows (0) both responses begin with the text" in line for line in result.report("dataset", 64))


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_stored_as_text_are_read(write: Callable[[Any], str], tokenizer: Any) -> None:
    row = {"prompt": [user("a"), assistant("it's"), user("b")], **TURNS}
    same(tokenizer, {name: write(value) for name, value in row.items()}, row)
    lines = lines_of([{name: write(value) for name, value in row.items()}], tokenizer)
    assert any("in all rows chosen holds messages as text, which was decoded" in line for line in lines)


def test_tools_and_template_options_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}[{{ tool.function | tojson }}]{% endfor %}{% if loud %}!{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    talk = {"prompt": [user("a")], **TURNS}
    for row in (
        {**talk, "tools": [tool], "chat_template_kwargs": {"loud": True}},
        {**talk, "tools": json.dumps([tool]), "chat_template_kwargs": '{"loud": true}'},
    ):
        text = tokenizer.decode(one(row, tokenizer, 200).prompt.tolist())
        assert text == '[{"name": "clock", "parameters": {}}]!user:a;'
    assert not any("tools" in line for line in lines_of([{**talk, "tools": [tool]}, talk], tokenizer))
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    lines = lines_of([{**talk, "tools": [tool]}, {**talk, "tools": []}], tokenizer)
    assert "dataset: in 1 rows (0) the chat template leaves out their tools" in lines


def test_null_content_and_text_parts_are_text(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "sky", "image": None}, {"type": "text", "text": "?"}]
    row = {"prompt": [{"role": "user", "content": parts, "name": None}], **TURNS}
    same(tokenizer, row, {"prompt": [user("sky?")], **TURNS})
    empty = [{"role": "assistant", "content": None}]
    same(tokenizer, {**row, "rejected": empty}, {**row, "rejected": [assistant("")]})
    assert "dataset: in all rows rejected is empty or blank" in lines_of([{**row, "rejected": empty}], tokenizer)


def test_half_an_emoji_costs_one_character(tokenizer: Any) -> None:
    rows = [TEXT, {"prompt": "a \ud83d", "chosen": "b", "rejected": "c \ude00"}]
    result = tokenize_rows(rows, tokenizer, max_length=64)
    assert tokenizer.decode(result.pairs[1].rejected.ids.tolist()) == "a \ufffdc \ufffd<|end|>"
    assert any("in 1 rows (1) half a character" in line for line in result.report("dataset", 64))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("the sky is blue", "the sky is blond", "the sky is"),
        ("the sky is", "the sky is green", "the sky is"),
        ("the sky", "the skyline", "the"),
        ("I don't", "I don", "I"),
        ("in 2024", "in 2025", "in"),
        ("Human: hi\n\nAssistant: Hello", "Human: hi\n\nAssistant: He", "Human: hi\n\nAssistant:"),
        ("caf\u0065\u0301 a", "caf\u0065 b", ""),  # an accent of its own
        ("天空是蓝色", "天空是绿色", "天空是"),
        ("so \U0001f469\u200d\U0001f52c", "so \U0001f469\u200d\U0001f680", "so"),  # a woman and her profession
    ],
)
def test_an_implicit_prompt_of_text_ends_with_a_word(chosen: str, rejected: str, prompt: str, tokenizer: Any) -> None:
    for row in ({"chosen": chosen, "rejected": rejected}, {"chosen": rejected, "rejected": chosen}):
        example = read_row(row, 0)
        assert (example.prompt, example.prompt + example.chosen) == (prompt, row["chosen"])
        assert example.prompt + example.rejected == row["rejected"]


def test_rows_without_a_prompt_are_counted_and_refused_where_another_column_may_be_it(tokenizer: Any) -> None:
    rows = [{"chosen": "the sky", "rejected": "the sea"}, {"chosen": "yes", "rejected": "no"}]
    assert any("in 1 rows (1) there is no prompt" in line for line in lines_of(rows, tokenizer))
    with pytest.raises(ValueError, match=r"1 of 2 rows have no prompt.*If frage is the prompt.*\"prompt\": \"frage\""):
        lines_of([{**row, "frage": "what?", "score": 1.5} for row in rows], tokenizer)
    lines = lines_of([{**row, "score": 1.5} for row in rows], tokenizer)
    assert "dataset: columns that are not used: score" in lines


def test_equal_responses_blank_ones_and_repeated_pairs_are_counted(tokenizer: Any) -> None:
    rows = [TEXT, {**TEXT, "rejected": "b"}, TEXT, {**TEXT, "chosen": " \n"}, {**TEXT, "rejected": ""}]
    assert lines_of(rows, tokenizer)[1:] == [
        "dataset: in 1 rows (3) chosen is empty or blank",
        "dataset: in 1 rows (4) rejected is empty or blank",
        "dataset: in 1 rows (1) chosen and rejected are the same tokens",
        "dataset: in 1 rows (2) the pair is that of an earlier row",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None, **ANSWERS}, "row 1: prompt is null: give the row a prompt or leave it out"),
        ({"question": " ", **ANSWERS}, "row 1: question is empty, and there is no other prompt"),
        ({"question": "a", "instruction": "b", **ANSWERS}, "question or instruction may be it: columns="),
        ({"history": [["a", "b"]], **TEXT}, "row 1 has a column 'history': write its turns as messages"),
        ({"system": "s", **ANSWERS}, "row 1 has a system, but no prompt beside responses of text"),
        ({"system": 5, **TEXT}, "row 1: system must be a string, got 5"),
        (
            {"system": "s", "prompt": [{"role": "system", "content": "t"}, user("a")], **TURNS},
            "row 1 has two system messages",
        ),
        ({**TEXT, "chosen": '[{"role": "user", '}, "row 1: chosen looks like messages stored as text, but is neither"),
        (
            {"conversations": [], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
            "row 1: chosen[0] is a message in ShareGPT's form: rename 'from' to 'role' (human to user, gpt to assis",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "row 1 has no 'chosen'; its columns are conversations"),
        ({"prompt": "a", "responses": ["b", "c"]}, "It looks like a ranking: make a pair of its best and its worst"),
        ({"prompt": "a", "response_0": "b", "response_1": "c"}, "It looks like a ranking"),
        ({"prompt": "a", "good": "b", "bad": "c"}, 'and columns=\'{"chosen": "..."}\' names others'),
        ({**TEXT, "tools": [{"name": "f"}]}, "row 1 is text, to which tools and chat_template_kwargs mean nothing"),
        ({"prompt": [user("a")], **TURNS, "tools": "[{"}, "row 1: tools is text, but not valid JSON"),
        ({"prompt": [user("a")], **TURNS, "tools": {}}, "row 1: tools must be a list of JSON schemas, got {}"),
        (
            {"prompt": [user("a")], **TURNS, "chat_template_kwargs": [1]},
            "row 1: chat_template_kwargs must be a dict, got [1]",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], **TURNS},
            "row 1: prompt[0]['content'] may hold parts of text only, got {'type': 'image'}",
        ),
        ({"chosen": "a b", "rejected": "a c"}, "all or none must have a prompt"),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused(row: Row, message: str, tokenizer: Any) -> None:
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    with pytest.raises((ValueError, TypeError)) as raised:
        tokenize_rows([TEXT, row], tokenizer, max_length=64)
    assert message in str(raised.value)


def test_a_template_that_fails_names_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"row 0: the chat template fails: .*no system role"):
        one(TALK, tokenizer)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.tuples(*[st.text(alphabet="ab the skyis?\n蓝é🙂", max_size=12)] * 3))
def test_every_sequence_is_prompt_plus_response_and_the_border_lies_within_the_prompt(
    texts: tuple[str, str, str], tokenizer: Any
) -> None:
    prompt, chosen, rejected = texts
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    result = tokenize_rows([row, TEXT], tokenizer, max_length=200)  # a prompt and response of no tokens drop the first
    for pair in result.pairs[:-1]:
        for response, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
            assert tokenizer.decode(response.ids.tolist()) == prompt + text + "<|end|>"
            assert prompt.startswith(tokenizer.decode(response.ids[: response.start].tolist()).rstrip("\ufffd"))
            unscored = tokenizer(prompt)["input_ids"][: response.start]
            assert response.ids[: response.start].tolist() == unscored


@pytest.mark.parametrize("name", ["dpo_en.jsonl", "dpo_zh.jsonl"])
def test_on_real_data_the_scored_text_is_the_response(name: str, make_tokenizer: Callable[..., Any]) -> None:
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(REAL_DATA / "gpt2-tokenizer"))
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:60]
    result = tokenize_rows(rows, tokenizer, max_length=100_000)
    assert (len(result.pairs), result.truncated) == (60, 0)
    for row, pair in zip(rows, result.pairs, strict=True):
        for kind in ("chosen", "rejected"):
            text = scored(getattr(pair, kind), tokenizer)
            assert text.strip() == row[kind][-1]["content"].strip() + "<|endoftext|>"
