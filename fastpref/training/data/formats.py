"""From rows to text: the dataset formats, implicit prompts, the chat template.

A row holds `chosen` and `rejected`, and `prompt` unless both responses start with it (an implicit prompt).
All of them are strings (plain text), or all are lists of messages, dicts with `role` and `content`
(conversational). These are TRL's formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.checks import describe

# For a tokenizer without a template. Each turn is "Role: text"; turns are parted by an empty line, and an
# assistant's turn ends with the end-of-sequence token, which is how a model learns to stop.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

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


def render_row(row: Any, index: int, tokenizer: Any) -> RenderedPair:
    """One dataset row as text; errors name the row by its index."""
    prompt, chosen, rejected = _columns(row, index)
    if isinstance(chosen, str):
        return RenderedPair(index, prompt, prompt + chosen, prompt + rejected, conversational=False)
    rendered = _render(tokenizer, prompt, index, add_generation_prompt=True)
    texts = []
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response or response[0]["role"] != "assistant":
            got = f"a {response[0]['role']!r} message" if response else "no message"
            raise ValueError(f"row {index}: {name} must start with an 'assistant' message, got {got} after the prompt")
        text = _render(tokenizer, [*prompt, *response], index, add_generation_prompt=False)
        if not text.startswith(rendered):
            raise ValueError(
                f"row {index}: the chat template rewrites the prompt once the {name} response follows it, so "
                f"that the response's start cannot be told: the prompt renders as ...{rendered[-60:]!r}, and "
                f"there the whole reads ...{text[max(len(rendered) - 60, 0) : len(rendered)]!r}; use a "
                "chat_template that keeps the prompt as it is"
            )
        texts.append(text)
    other_turns = any(message["role"] != "assistant" for message in [*chosen, *rejected])
    return RenderedPair(index, rendered, texts[0], texts[1], conversational=True, other_turns=other_turns)


def has_messages(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("chosen"), list)


def read_chat_template(value: str) -> str:
    """The template's text: the option is the text itself, or the path of a file that holds it."""
    if "{" in value or "\n" in value:
        return value
    path = Path(value)
    if not path.is_file():
        raise ValueError(f"chat_template is neither Jinja text nor a file: {value!r}")
    return path.read_text(encoding="utf-8")


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


def common_prefix(a: Any, b: Any) -> int:
    """How many leading items (characters, messages, tokens) two sequences share."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _check_messages(messages: list[Any], name: str) -> None:
    if not messages:
        raise ValueError(f"{name} is an empty list of messages")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"{name}[{place}] must be a dict with 'role' and 'content', got {describe(message)}")
        if not isinstance(message.get("content"), str):
            raise TypeError(f"{name}[{place}]['content'] must be a string, got {describe(message.get('content'))}")


def _render(tokenizer: Any, messages: list[Any], index: int, *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template may raise anything, jinja2's own errors included: name the row
        raise ValueError(f"row {index}: the chat template fails: {type(error).__name__}: {error}") from error
