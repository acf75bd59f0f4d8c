"""From rows to text: which column is the prompt, text or messages, where an implicit prompt ends.

The forms are TRL's: `prompt`, `chosen` and `rejected`, all strings (plain text) or all lists of messages, dicts with
`role` and `content` (conversational); without `prompt` it is what both responses begin with. What other datasets
plainly mean is mapped to these, with a note that the run prints; what cannot be meant is refused. docs/data.md shows
each form.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from fastpref.checks import describe
from fastpref.training.data.templates import ChatTemplate, check_tool_calls, common_prefix

SIDES = ("chosen", "rejected")
QUESTIONS = ("question", "instruction", "input", "query")  # what datasets without a prompt call their user's message
OPTIONS = ("tools", "chat_template_kwargs")  # of the chat template
COLUMNS = ("prompt", *SIDES, "system", *OPTIONS, "ref_chosen_logps", "ref_rejected_logps")
# Columns that change what is trained on. Leaving them out would train on something else without a word.
REFUSED = {
    "images": "images are not supported: remove the column from the dataset",
    "image": "images are not supported: remove the column from the dataset",
    "history": "write its turns as messages of the prompt",
}
RANKINGS = re.compile(r"(responses|completions|answers|generations|candidates|outputs?)|(response|answer)_[0-9abj]")
STORED_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
NO_PROMPT = "there is no prompt: the responses begin with different words"
TAKEN_ONCE = "both responses begin with the prompt that also stands beside them: it is taken once"
UNSPACED = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)  # Chinese, Japanese


class Example(NamedTuple):
    """A row as it is meant: strings, or lists of messages. The responses do not hold the prompt."""

    prompt: Any
    chosen: Any
    rejected: Any
    options: dict[str, Any]  # of `apply_chat_template`
    implicit: bool  # the prompt was found in the responses
    notes: tuple[str, ...]  # what a user should know of the row, in words that are the same for all such rows


class RenderedPair(NamedTuple):
    """One row as text. `chosen` and `rejected` hold the prompt and the response."""

    row: int
    prompt: str
    chosen: str
    rejected: str
    conversational: bool
    implicit: bool = False  # the prompt was found in the responses
    notes: tuple[str, ...] = ()  # as `Example` has them


def in_order(rows: Sequence[Any]) -> Iterator[Any]:
    """The rows one by one; a `datasets.Dataset` is read several times faster so than by index.

    Arrow gives the messages, tools and arguments of a column all the keys that any of them has, with null where one
    lacks them. A template would write these nulls, so they are left out.
    """
    if hasattr(rows, "features"):
        return ({name: _without_null(value) for name, value in row.items()} for row in rows)
    return iter(rows) if hasattr(type(rows), "__iter__") else (rows[index] for index in range(len(rows)))


def read_row(row: Any, index: int, *, repeated: bool = False) -> Example:
    """One row of a dataset; `repeated`: the responses hold the prompt that stands beside them, too.

    Raises:
        ValueError, TypeError: naming the row by its index.
    """
    where = f"row {index}"
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be a dict with prompt, chosen and rejected, got {describe(row)}")
    for name, remedy in REFUSED.items():
        if row.get(name):
            raise ValueError(f"{where} has a column {name!r}: {remedy}")
    for name in SIDES:
        if row.get(name) is None:
            columns = ", ".join(map(str, row)) or "none"
            raise ValueError(f"{where} has no {name!r}; its columns are {columns}{_conversion(row)}")
    notes: list[str] = []
    chosen, rejected = (_value(row[name], name, where, notes) for name in SIDES)
    name, prompt = _prompt(row, where)
    prompt = None if prompt is None else _value(prompt, name, where, notes)
    if isinstance(chosen, str) != isinstance(rejected, str):
        kinds = ", ".join(f"{side} is {_kind(value)}" for side, value in zip(SIDES, (chosen, rejected), strict=True))
        raise TypeError(f"{where} mixes text and messages ({kinds}): use one form for all of its columns")
    implicit, by_role = prompt is None, name != "prompt" or "system" in row or isinstance(prompt, list)
    if repeated and isinstance(prompt, str) and isinstance(chosen, str):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        notes.append(TAKEN_ONCE)
    if prompt is not None and isinstance(chosen, str) and by_role:
        chosen, rejected = _message("assistant", chosen), _message("assistant", rejected)
        given = f"system and {name}" if "system" in row else name
        notes.append(f"{given} and the responses are put into messages, which the chat template renders")
    if prompt is None:
        prompt, chosen, rejected = _split(chosen, rejected, where)
    elif isinstance(prompt, str) and isinstance(chosen, list):
        if chosen[0]["role"] == "assistant":
            prompt = _message("user", prompt)
            notes.append(f"the text of {name} is put into a user's message, as the responses are messages")
        else:  # whole conversations: the text is a copy of what they begin with
            text, (prompt, chosen, rejected) = prompt.strip(), _split(chosen, rejected, where)
            held = any(message["content"].strip() == text for message in prompt if message["role"] == "user")
            said = "is a message of" if held else "is left out, as no message says it, beside"
            notes.append(f"the text of {name} {said} the whole conversations in chosen and rejected")
    elif isinstance(prompt, list) and all(side[: len(prompt)] == prompt for side in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        notes.append(TAKEN_ONCE)
    if not _is_blank(row.get("system")):
        prompt = _with_system(prompt, row["system"], where)
    elif implicit and isinstance(prompt, str) and not prompt.strip():
        notes.append(NO_PROMPT)
    if not repeated and repeats_prompt(row):
        notes.append("both responses begin with the text of the prompt: it is taken as written, and stands twice")
    notes += [
        f"{name} is empty or blank" for name, side in zip(SIDES, (chosen, rejected), strict=True) if _says_nothing(side)
    ]
    return Example(prompt, chosen, rejected, _options(row, where), implicit, tuple(notes))


def render_row(row: Any, index: int, template: ChatTemplate, *, repeated: bool = False) -> RenderedPair:
    """One dataset row as text; `repeated` as `read_row` has it. Errors name the row by its index."""
    prompt, chosen, rejected, options, implicit, notes = read_row(row, index, repeated=repeated)
    if isinstance(chosen, str):
        if options:
            raise ValueError(f"row {index} is text, to which tools and chat_template_kwargs mean nothing: use messages")
        return RenderedPair(index, prompt, prompt + chosen, prompt + rejected, False, implicit, notes)
    if options:
        template = replace(template, options=options)
    rendered = template.render_prompt(prompt, index)
    texts = []
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response or response[0]["role"] != "assistant":
            got = f"a {response[0]['role']!r} message" if response else "no message"
            raise ValueError(f"row {index}: {name} must start with an 'assistant' message, got {got} after the prompt")
        texts.append(template.render_response(prompt, response, name, index, rendered))
    found = [*notes, *template.notes(prompt, [chosen, rejected], rendered, texts)]
    if any(message["role"] != "assistant" for message in [*chosen, *rejected]):
        found.append("a response has turns other than the assistant's: all of its tokens are scored")
    return RenderedPair(index, rendered, texts[0], texts[1], True, implicit, tuple(found))


def is_conversational(rows: Sequence[Any]) -> bool:
    """Whether the first row, and so each of them, is rendered by the chat template."""
    with naming_file(rows, 0):
        return isinstance(read_row(rows[0], 0).chosen, list)


@contextmanager
def naming_file(rows: Sequence[Any], index: int) -> Iterator[None]:
    """Errors of a row name its file, where the rows come from files."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not hasattr(rows, "where"):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{rows.where(index)}: {error}") from error


def repeats_prompt(row: Any) -> bool:
    """Whether both responses begin with the text that stands in `prompt`."""
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    return (
        isinstance(prompt, str)
        and bool(prompt.strip())
        and all(isinstance(row.get(name), str) and row[name].startswith(prompt) for name in SIDES)
    )


def unused_columns(row: Any) -> list[str]:
    """Columns of the row that mean nothing here."""
    used = {*COLUMNS, *(() if "prompt" in row else QUESTIONS)}
    return [name for name in row if name not in used]


def rename(rows: Any, columns: Mapping[str, str] | None) -> Any:
    """The rows with columns under our names; `columns` gives theirs by ours.

    Raises:
        ValueError: the first row has no such column.
    """
    if not columns:
        return rows
    first = rows[0] if isinstance(rows[0], Mapping) else {}
    for ours, theirs in columns.items():
        if theirs not in first:
            have = ", ".join(map(str, first)) or "none"
            raise ValueError(f"columns: {ours!r} is to be read from {theirs!r}, but the columns are {have}")
    moved = set(columns.values())
    if hasattr(rows, "rename_columns"):
        replaced = [name for name in columns if name in first and name not in moved]
        return rows.remove_columns(replaced).rename_columns({theirs: ours for ours, theirs in columns.items()})

    def renamed(row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        kept = {name: value for name, value in row.items() if name not in moved and name not in columns}
        return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}

    found = [renamed(row) for row in in_order(rows)]
    if not hasattr(rows, "where"):
        return found
    rows[:] = found
    return rows


def _prompt(row: Mapping[str, Any], where: str) -> tuple[str, Any]:
    """The column that holds the prompt, and what it holds: None where there is no such column."""
    if "prompt" in row:
        if row["prompt"] is None:
            raise ValueError(
                f"{where}: prompt is null: give the row a prompt or leave it out; where all responses begin with "
                "their prompt, leave out the column"
            )
        return "prompt", row["prompt"]
    names = [name for name in QUESTIONS if not _is_blank(row.get(name))]
    if names == ["instruction", "input"] and all(isinstance(row[name], str) for name in names):
        return "instruction and input", "\n".join(row[name] for name in names)
    if len(names) > 1:
        raise ValueError(
            f"{where} has no 'prompt', and {' or '.join(names)} may be it: columns='{{\"prompt\": \"{names[0]}\"}}' "
            "names one"
        )
    if names:
        return names[0], row[names[0]]
    for name in QUESTIONS:
        if name in row:
            raise ValueError(f"{where}: {name} is empty, and there is no other prompt: leave the row out")
    return "prompt", None


def _value(value: Any, name: str, where: str, notes: list[str]) -> Any:
    """A column's text, or its messages: checked, with their content as text."""
    label = f"{where}: {name}"
    if isinstance(value, str) and STORED_MESSAGES.match(value):
        try:
            value = json.loads(value)
        except ValueError:
            try:
                value = ast.literal_eval(value)  # as Python prints lists, which pandas writes into CSV files
            except (ValueError, SyntaxError):
                raise ValueError(
                    f"{label} looks like messages stored as text, but is neither JSON nor Python: write the dataset as "
                    f"JSON lines; got {describe(value)}"
                ) from None
        notes.append(f"{name} holds messages as text, which was decoded")
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value.keys() & {"role", "from"}:
        value = [value]
    if not isinstance(value, list):
        raise TypeError(f"{label} must be a string or a list of messages, got {describe(value)}")
    if not value:
        raise ValueError(f"{label} is an empty list of messages")
    return [_checked(message, f"{label}[{place}]") for place, message in enumerate(value)]


def _checked(message: Any, name: str) -> Any:
    if isinstance(message, Mapping) and message.keys() >= {"from", "value"} and not message.get("role"):
        raise TypeError(
            f"{name} is a message in ShareGPT's form: rename 'from' to 'role' (human to user, gpt to assistant) and "
            "'value' to 'content'; docs/data.md has the lines that do it"
        )
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TypeError(f"{name} must be a dict with 'role' and 'content', got {describe(message)}")
    if message.get("tool_calls"):
        check_tool_calls(message, name)
    content = message.get("content")
    if isinstance(content, str) and None not in message.values():
        return message
    empty = content is None and ("content" in message or message.get("tool_calls"))
    # Templates ask which keys are there.
    message = {key: value for key, value in message.items() if value is not None}
    if empty:
        content = ""
    elif isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise TypeError(f"{name}['content'] may hold parts of text only, got {describe(part)}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise TypeError(f"{name}['content'] must be a string or a list of text parts, got {describe(content)}")
    return {**message, "content": content}


def _options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `apply_chat_template` gets besides the messages, from the row's `tools` and `chat_template_kwargs`."""
    tools, options = (_decoded(row.get(name), f"{where}: {name}") for name in OPTIONS)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise TypeError(f"{where}: tools must be a list of JSON schemas, got {describe(tools)}")
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{where}: chat_template_kwargs must be a dict, got {describe(options)}")
    return {**(options or {}), **({"tools": tools} if tools else {})}


def _decoded(value: Any, name: str) -> Any:
    """JSON text, as datasets store what differs from row to row, decoded."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"{name} is text, but not valid JSON: {error}") from error


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _split(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """The prompt that both begin with, and what follows in each; of messages the last always stays a response."""
    if isinstance(chosen, str):
        common = _word_border(chosen, rejected)
    else:
        differ = (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        common = min(next(differ, len(chosen)), len(chosen) - 1, len(rejected) - 1)
        if common < 1:
            raise ValueError(f"{where} has no prompt, and its chosen and rejected messages do not start with one")
    return chosen[:common], chosen[common:], rejected[common:]


def _with_system(prompt: Any, system: Any, where: str) -> list[Any]:
    if not isinstance(system, str):
        raise TypeError(f"{where}: system must be a string, got {describe(system)}")
    if isinstance(prompt, str):
        raise ValueError(f"{where} has a system, but no prompt beside responses of text: columns names the prompt's")
    if prompt[0]["role"] != "system":
        return [*_message("system", system), *prompt]
    if prompt[0]["content"] != system:
        raise ValueError(f"{where} has two system messages, its column 'system' and one in the prompt: leave out one")
    return prompt


def _word_border(a: str, b: str) -> int:
    """Characters of the start that two texts share, to the end of a word; the space after it is the responses'."""
    border = common_prefix(a, b)
    while border > 0 and any(border < len(text) and _joined(text[border - 1], text[border]) for text in (a, b)):
        border -= 1
    return border - 1 if border and a[border - 1] == " " else border


def _joined(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to a word, or to one visible character."""
    if unicodedata.category(right).startswith("M") or "\u200d" in (left, right):  # accents; parts of an emoji
        return True
    in_word = all(char.isalnum() or char in "_'’" for char in (left, right))
    return in_word and not (UNSPACED.match(left) or UNSPACED.match(right))


def _conversion(row: Mapping[str, Any]) -> str:
    """What to do about a row that is no pair."""
    if "conversations" in row:
        return ". It looks like ShareGPT's form, in which a pair has chosen and rejected messages: docs/data.md"
    if any(RANKINGS.fullmatch(str(name)) for name in row):
        return (
            ". It looks like a ranking: make a pair of its best and its worst response; docs/data.md has the lines "
            "that do it"
        )
    return ', and columns=\'{"chosen": "..."}\' names others' if len(row) > 1 else ""


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "messages"


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value)


def _says_nothing(response: str | Iterable[Mapping[str, Any]]) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in response)
