"""Chat templates: where a response begins, in all that TRL ships, and what a template rewrites or leaves out."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpref.training.data.templates import DEFAULT_CHAT_TEMPLATE, ChatTemplate
from fastpref.training.data.tokens import PairSet, Response, data_digest, tokenize_rows
from fastpref.training.reference.cache import text_digest

Row = dict[str, Any]

SPEC = importlib.util.find_spec("trl")  # not imported: that takes seconds
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC is not None and SPEC.origin else None
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.jinja")) if FOLDER is not None else []
THINKING = ("deepseek", "nemotron")  # the generation prompt ends with "<think>\n", a plain response does not begin so
NO_SYSTEM = ("gemma", "gemma_training")
REWRITES, LEAVES_OUT, ENDLESS = "for generation, but", "leaves out text of a message", "writes nothing after the resp"
HEADERS = {"gptoss": "final", "muse_glimmer": " to=user"}  # what such a template has a model write before its text

QUESTION, CHOSEN, REJECTED = "What colour is the sky?", "It is blue.", "Perhaps green."


def turn(role: str, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


PAIR = {
    "prompt": [turn("user", QUESTION)],
    "chosen": [turn("assistant", CHOSEN)],
    "rejected": [turn("assistant", REJECTED)],
}


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """One token for each byte, and one for each mark in angle brackets that the template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(sorted(set(re.findall(r"<[^\s<>{}'\"]+>", template))))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|end|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def prepared(template: str, *rows: Row) -> tuple[PairSet, PreTrainedTokenizerFast]:
    tokenizer = tokenizer_for(template)
    return tokenize_rows(rows, tokenizer, max_length=10_000), tokenizer


def scored(response: Response, tokenizer: Any, **options: Any) -> str:
    return tokenizer.decode(response.ids[response.start :].tolist(), **options)


@pytest.mark.skipif(not SHIPPED, reason="needs TRL, whose chat templates these are")
@pytest.mark.parametrize("before", ["nothing", "system", "turns"])
@pytest.mark.parametrize("name", SHIPPED)
def test_in_each_template_the_response_is_scored_and_nothing_of_the_prompt(name: str, before: str) -> None:
    earlier = {
        "nothing": [],
        "system": [turn("system", "Be brief.")],
        "turns": [turn("user", "Hello?"), turn("assistant", "<think>\nHm.\n</think>\n\nGood day.")],
    }[before]
    row = {**PAIR, "prompt": [*earlier, *PAIR["prompt"]]}
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    if before == "system" and name in NO_SYSTEM:
        with pytest.raises(ValueError, match="row 0: the chat template fails: TemplateError: System role not supp"):
            prepared(template, row)
        return
    result, tokenizer = prepared(template, row)
    header = HEADERS.get(name.removesuffix("_training"), "")
    for kind, text in (("chosen", CHOSEN), ("rejected", REJECTED)):
        response = getattr(result.pairs[0], kind)
        assert scored(response, tokenizer, skip_special_tokens=True).strip() == (header + text).strip()
        prompt = tokenizer.decode(response.ids[: response.start].tolist())
        assert QUESTION in prompt
        assert text not in prompt
        for message in earlier:
            assert message["content"].split("\n")[-1] in prompt
    assert any(REWRITES in note for note in result.notes) == name.startswith(THINKING)
    assert not any(LEAVES_OUT in note for note in result.notes)
    assert any(ENDLESS in note for note in result.notes) == (name == "glm4moe")


TURNS = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
START = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
# The generation prompt has a model think; a response without a thought gets an empty one.
THINK = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and '<think>' not in m['content'] %}<think></think>{% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
FORGETS = TURNS.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}") + START
# The system message goes into the last turn: into the user's, until a response follows.
SYSTEM_LAST = (
    "{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>"
    "{% if loop.last and m['role'] == 'user' %}{{ messages[0]['content'] }} {% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}" + START
)
CALLS = TURNS.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% for c in m['tool_calls'] %}<call>{{ CALL }}</call>{% endfor %}"
)
CALLS_AS_DICT = CALLS.replace("CALL", "c['function']['name'] ~ ' ' ~ c['function']['arguments'] | tojson") + START
CALLS_AS_TEXT = CALLS.replace("CALL", "c['function']['name'] + ' ' + c['function']['arguments']") + START


def test_the_end_of_a_prompt_that_a_response_does_not_follow_is_cut_off_counted_and_said() -> None:
    thought = turn("assistant", "<think>\nSurely.</think>Blue.")
    result, tokenizer = prepared(
        THINK, PAIR, {**PAIR, "chosen": [thought]}, {**PAIR, "chosen": [thought], "rejected": [thought]}
    )
    plain, mixed, thinking = result.pairs
    assert scored(plain.chosen, tokenizer) == "</think>It is blue.<|end|>"
    assert scored(mixed.chosen, tokenizer) == scored(thinking.rejected, tokenizer) == "Surely.</think>Blue.<|end|>"
    assert scored(mixed.rejected, tokenizer) == "</think>Perhaps green.<|end|>"
    assert mixed.chosen.start == mixed.rejected.start + 1 == len(mixed.prompt) + 1
    start = f"<s><|user|>{QUESTION}<|end|><|assistant|><think>"  # one BOS
    assert tokenizer.decode(plain.prompt.tolist()) == tokenizer.decode(mixed.prompt.tolist()) == start
    assert tokenizer.decode(thinking.prompt.tolist()) == start + "\n"
    assert any(
        line.startswith(r"data: in 2 rows (0, 1) the prompt ends with '\n' for generation, but the chat template does")
        for line in result.report("data", 9)
    )


@pytest.mark.parametrize(
    "template",
    [SYSTEM_LAST, TURNS.replace("role'] }", "role'] if loop.last else 'earlier' }") + START, TURNS + " " + START],
    ids=["a system message", "the user's role", "the response's header"],
)
def test_a_template_that_rewrites_the_prompt_so_that_it_would_be_scored_is_refused(template: str) -> None:
    row = {**PAIR, "prompt": [turn("system", "Be brief."), *PAIR["prompt"]]}
    with pytest.raises(
        ValueError, match=r"row 0: .* rewrites the prompt once the chosen response follows, so that \d+"
    ):
        prepared(template, row)


def test_a_question_of_a_role_that_the_template_passes_over_is_refused() -> None:
    template = TURNS.replace("in messages", "in messages if m['role'] in ('user', 'assistant')") + START
    with pytest.raises(
        ValueError, match="row 1: the chat template leaves out the last message of the prompt, of the r"
    ):
        prepared(template, PAIR, {**PAIR, "prompt": [turn("human", QUESTION)]})


def test_earlier_thinking_that_a_template_takes_out_leaves_the_border_where_it_is() -> None:
    earlier = [turn("user", "Hello?"), turn("assistant", "<think>Hm.</think>Good day.")]
    result, tokenizer = prepared(FORGETS, {**PAIR, "prompt": [*earlier, *PAIR["prompt"]]})
    pair = result.pairs[0]
    assert tokenizer.decode(pair.prompt.tolist()) == (
        f"<s><|user|>Hello?<|end|><|assistant|>Good day.<|end|><|user|>{QUESTION}<|end|><|assistant|>"
    )
    assert scored(pair.rejected, tokenizer) == "Perhaps green.<|end|>"
    assert not result.notes


@pytest.mark.parametrize(
    "changes",
    [
        {"rejected": [turn("assistant", "<think>Hm.</think>Blue.")]},
        {"rejected": [turn("assistant", "Blue.", reasoning_content="Hm.")]},
        {"prompt": [turn("developer", "Be brief."), *PAIR["prompt"]]},
    ],
)
def test_text_that_a_template_leaves_out_is_counted(changes: Row) -> None:
    template = FORGETS.replace("in messages", "in messages if m['role'] in ('user', 'assistant')")
    result, _ = prepared(template, PAIR, {**PAIR, **changes})
    assert [rows for note, rows in result.notes.items() if LEAVES_OUT in note] == [[1]]
    assert any("data: in 1 rows (1) the chat template leaves out text" in line for line in result.report("data", 9))


def test_a_response_that_the_template_does_not_end_is_counted() -> None:
    result, _ = prepared("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", PAIR)
    assert [rows for note, rows in result.notes.items() if ENDLESS in note] == [[0]]


def call(arguments: Any) -> Row:
    return turn(
        "assistant", None, tool_calls=[{"type": "function", "function": {"name": "look", "arguments": arguments}}]
    )


@pytest.mark.parametrize("template", [CALLS_AS_DICT, CALLS_AS_TEXT])
@pytest.mark.parametrize("arguments", [{"up": True}, '{"up": true}'])
def test_a_tool_call_without_text_is_trained_and_its_arguments_are_json_once(template: str, arguments: Any) -> None:
    result, tokenizer = prepared(template, {**PAIR, "chosen": [call(arguments)]})
    assert scored(result.pairs[0].chosen, tokenizer) == '<call>look {"up": true}</call><|end|>'
    assert scored(result.pairs[0].rejected, tokenizer) == "Perhaps green.<|end|>"


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({**PAIR, "rejected": [turn("assistant", "Let me see."), call({})]}, "rejected[1]"),
        ({**PAIR, "prompt": [*PAIR["prompt"], call({}), turn("tool", "blue")]}, "prompt[1]"),
    ],
)
def test_a_tool_call_that_the_template_ignores_is_refused(row: Row, place: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: the chat template ignores the tool_calls of {re.escape(place)}"):
        prepared(DEFAULT_CHAT_TEMPLATE, PAIR, row)


@pytest.mark.parametrize(
    ("calls", "error", "message"),
    [
        ("look", TypeError, "row 0: chosen[0]['tool_calls'] must be a list of dicts, got 'look'"),
        ([{"function": "look"}], TypeError, "row 0: chosen[0]['tool_calls'] must name a function each"),
        (
            [{"name": "look", "arguments": "up"}],
            ValueError,
            "row 0: chosen[0]['tool_calls']: arguments='up' are not JSON",
        ),
    ],
)
def test_bad_tool_calls_are_named(calls: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        prepared(CALLS_AS_DICT, {**PAIR, "chosen": [turn("assistant", None, tool_calls=calls)]})


def test_a_template_that_reads_content_in_parts_gets_parts() -> None:
    template = (
        TURNS.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}") + START
    )
    result, tokenizer = prepared(template, PAIR)
    assert scored(result.pairs[0].chosen, tokenizer) == "It is blue.<|end|>"
    assert ChatTemplate.of(tokenizer).parts


def test_options_that_the_template_does_not_read_are_counted() -> None:
    template = (
        TURNS + "{% if add_generation_prompt %}<|assistant|>{% if not think %}<think></think>{% endif %}{% endif %}"
    )
    result, tokenizer = prepared(template, {**PAIR, "chat_template_kwargs": {"think": True, "thinking": False}})
    assert tokenizer.decode(result.pairs[0].prompt.tolist()).endswith("<|assistant|>")
    assert result.notes == {"the chat template does not read the chat_template_kwargs thinking": [0]}


def test_the_date_that_a_template_writes_is_the_same_on_every_day() -> None:
    """Otherwise no checkpoint could be resumed after midnight, and no reference log-prob be used again."""
    result, tokenizer = prepared(
        "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }} " + TURNS + START, PAIR
    )
    assert tokenizer.decode(result.pairs[0].prompt.tolist()).startswith("01 Jan 2026 2026-01-01 <s><|user|>")
    assert "data: in all rows the chat template writes the day's date: 2026-01-01 stands" in result.report("data", 9)[1]


def test_a_tokenizer_with_several_templates_renders_by_its_default_and_has_a_digest_of_all() -> None:
    tokenizer = tokenizer_for(TURNS + START)
    tokenizer.chat_template = {"default": TURNS + START, "tool_use": CALLS_AS_DICT}
    pair = tokenize_rows([PAIR], tokenizer, max_length=1000).pairs[0]
    assert scored(pair.chosen, tokenizer) == "It is blue.<|end|>"
    assert text_digest(tokenizer.chat_template) != text_digest({"default": TURNS + START, "tool_use": CALLS_AS_TEXT})


def test_ordinary_conversations_are_prepared_as_ever() -> None:
    several = [turn("system", "Be brief."), turn("user", "Hello?"), turn("assistant", "Good day."), *PAIR["prompt"]]
    result, _ = prepared(DEFAULT_CHAT_TEMPLATE, PAIR, {**PAIR, "prompt": several})
    assert result.report("data", 9) == ["data: 2 pairs of 2 rows"]
    # Caches of reference log-probs and checkpoints are found by this digest.
    assert data_digest(result.pairs) == "3366c76f8d06c8b109c14736b58dda1f1cef4f26a76e7b52c44949524df68be2"
