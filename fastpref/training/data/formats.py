"""From rows to text: the dataset formats and implicit prompts.

A row holds `chosen` and `rejected`, and `prompt` unless both responses start with it (an implicit prompt).
All of them are strings (plain text), or all are lists of messages, dicts with `role` and `content`
(conversational). These are TRL's formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastpref.checks import describe
from fastpref.training.data.templates import ChatTemplate, check_tool_calls, common_prefix, leaves_out

# Columns that change what TRL trains on. Leaving them out would train on something else without a word.
UNSUPPORTED_COLUMNS = ("tools", "images", "image", "chat_template_kwargs")


class RenderedPair(NamedTuple):
    """One row as text. `chosen` and `rejected` hold the prompt and the response."""

    row: int
    prompt: str
    chosen: str
    rejected: str
    conversational: bool
    other_turns: bool = False  # a response holds messages that are not the assistant's
    rewritten: bool = False  # the prompt's end is not the same once a response follows
    left_out: bool = False  # the chat template leaves out text of a response


def render_row(row: Any, index: int, template: ChatTemplate) -> RenderedPair:
    """One dataset row as text; errors name the row by its index."""
    prompt, chosen, rejected = _columns(row, index)
    if isinstance(chosen, str):
        return RenderedPair(index, prompt, prompt + chosen, prompt + rejected, conversational=False)
    rendered = template.render_prompt(prompt, index)
    texts = []
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response or response[0]["role"] != "assistant":
            got = f"a {response[0]['role']!r} message" if response else "no message"
            raise ValueError(f"row {index}: {name} must start with an 'assistant' message, got {got} after the prompt")
        texts.append(template.render_response(prompt, response, name, index, rendered))
    return RenderedPair(
        index,
        rendered,
        texts[0],
        texts[1],
        conversational=True,
        other_turns=any(message["role"] != "assistant" for message in [*chosen, *rejected]),
        rewritten=not all(text.startswith(rendered) for text in texts),
        left_out=leaves_out(texts[0], chosen) or leaves_out(texts[1], rejected),
    )


def has_messages(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("chosen"), list)


def _columns(row: Any, index: int) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a row, checked, with an implicit prompt made explicit."""
    if not isinstance(row, Mapping):
        raise TypeError(f"row {index} must be a dict with prompt, chosen and rejected, got {describe(row)}")
    for name in UNSUPPORTED_COLUMNS:
        if row.get(name) is not None:
            raise ValueError(f"row {index} has a column {name!r}, which is not supported: remove it from the dataset")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(f"row {index} has no {name!r}; its columns are {', '.join(map(str, row)) or 'none'}")
    given = {name: row[name] for name in ("prompt", "chosen", "rejected") if row.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, list):
            _check_messages(value, f"row {index}: {name}")
        elif not isinstance(value, str):
            raise TypeError(f"row {index}: {name} must be a string or a list of messages, got {describe(value)}")
    if len({isinstance(value, str) for value in given.values()}) == 2:
        kinds = ", ".join(f"{name} is {'text' if isinstance(v, str) else 'messages'}" for name, v in given.items())
        raise TypeError(f"row {index} mixes text and messages ({kinds}): use one form for all of its columns")
    chosen, rejected = given["chosen"], given["rejected"]
    if "prompt" in given:
        return given["prompt"], chosen, rejected
    common = common_prefix(chosen, rejected)
    if isinstance(chosen, list):  # an empty response is no response: the last message stays one
        common = min(common, len(chosen) - 1, len(rejected) - 1)
        if common < 1:
            raise ValueError(f"row {index} has no prompt, and its chosen and rejected messages do not start with one")
    return chosen[:common], chosen[common:], rejected[common:]


def _check_messages(messages: list[Any], name: str) -> None:
    if not messages:
        raise ValueError(f"{name} is an empty list of messages")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"{name}[{place}] must be a dict with 'role' and 'content', got {describe(message)}")
        if message.get("tool_calls"):
            check_tool_calls(message, f"{name}[{place}]")
            if message.get("content") is None:
                continue
        if not isinstance(message.get("content"), str):
            raise TypeError(f"{name}[{place}]['content'] must be a string, got {describe(message.get('content'))}")
