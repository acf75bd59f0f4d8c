"""From messages to text: the chat template, where it rewrites the prompt, and what it leaves out."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

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

# For today's date, where a template writes it: token ids that change at midnight can be neither resumed nor reused.
DATE = date(2026, 1, 1)
TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
SPOKEN = ("content", "reasoning_content", "reasoning", "thinking")  # what of an assistant's message is its text
# Messages that show which form a template reads: what it takes in the wrong one, it passes over or fails on.
PROBE = "fastpref probe"
QUESTION = {"role": "user", "content": PROBE}
CALL = {"id": "probe0001", "type": "function", "function": {"name": "probe", "arguments": {"text": PROBE}}}
PROBES: dict[str, list[Any]] = {
    "parts": [QUESTION],
    "text_arguments": [{**QUESTION, "content": "?"}, {"role": "assistant", "tool_calls": [CALL]}],
}


def read_chat_template(value: str) -> str:
    """The template's text: the option is the text itself, or the path of a file that holds it."""
    if "{" in value or "\n" in value:
        return value
    path = Path(value)
    if not path.is_file():
        raise ValueError(f"chat_template is neither Jinja text nor a file: {value!r}")
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with the form of messages that it reads; `of` finds that out.

    Vision templates read a message's content as a list of parts (`parts`) and pass over a string. A few templates
    want the arguments of a tool call as JSON text (`text_arguments`); the others want a dict, and write text as JSON
    once more.
    """

    tokenizer: Any
    parts: bool = False
    text_arguments: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # a row's tools, and what else its template reads

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        template = cls(tokenizer)
        for form, messages in PROBES.items():
            changed: dict[str, Any] = {form: True}
            other = replace(template, **changed)
            if not template._shows(messages) and other._shows(messages):
                template = other
        return template

    def render(self, messages: list[Any], index: int, *, add_generation_prompt: bool = False) -> str:
        """The messages of dataset row `index` as text.

        Raises:
            ValueError: the template fails.
        """
        messages = [self._readable(message) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
                **({"chat_template": TODAY.sub(_day, self._text)} if TODAY.search(self._text) else {}),
            )
        except Exception as error:  # a template may raise anything, jinja2's own errors included: name the row
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"row {index}: the chat template fails: {type(error).__name__}: {error}; the messages are of {roles}: "
                "change the row or set another chat_template"
            ) from error

    def render_prompt(self, prompt: list[Any], index: int) -> str:
        """The prompt as text, with the generation prompt.

        Raises:
            ValueError: the template fails, or leaves out the last message, as many do with roles they do not know.
        """
        text, last = self.render(prompt, index, add_generation_prompt=True), prompt[-1]
        if last["role"] != "assistant" and leaves_out(text, [last]):
            raise ValueError(
                f"row {index}: the chat template leaves out the last message of the prompt, of the role "
                f"{last['role']!r}: give it a role that the template renders, such as 'user', or set another "
                "chat_template"
            )
        return text

    def render_response(self, prompt: list[Any], response: list[Any], name: str, index: int, rendered: str) -> str:
        """Prompt and response as text, where `rendered` is the prompt with the generation prompt.

        Some templates end the generation prompt otherwise than they begin a response (with "<think>", say). That is
        left to the caller, who cuts at the common prefix; all that stands before must stay.

        Raises:
            ValueError: the template fails, ignores a tool call, or rewrites what would be scored as response then.
        """
        text = self.render([*prompt, *response], index)
        if not text.startswith(rendered):
            border, messages_end = (common_prefix(rendered, other) for other in (text, self.render(prompt, index)))
            end = rendered[border:].strip()
            if rendered[border:messages_end].strip() or (end and text[border:].lstrip().startswith(end)):
                raise ValueError(
                    f"row {index}: the chat template rewrites the prompt once the {name} response follows, so that "
                    f"{len(rendered) - border} characters of it would be scored as response: the prompt renders as "
                    f"{_around(rendered, border)}, and with the response as {_around(text, border)}; use a "
                    "chat_template that keeps the prompt as it is"
                )
        self._check_calls_shown(prompt, response, name, index)
        return text

    def _check_calls_shown(self, prompt: list[Any], response: list[Any], name: str, index: int) -> None:
        """With every call renamed after its message, the template must show all of the names."""
        messages = [*prompt, *response]
        names = {place: f"probe_{place}_" for place, message in enumerate(messages) if message.get("tool_calls")}
        if not names:
            return
        renamed = [_renamed(m, names[place]) if place in names else m for place, m in enumerate(messages)]
        text = self.render(renamed, index)
        for place in (place for place, probe in names.items() if probe not in text):
            here = f"prompt[{place}]" if place < len(prompt) else f"{name}[{place - len(prompt)}]"
            raise ValueError(
                f"row {index}: the chat template ignores the tool_calls of {here}, which would be left out without a "
                "word: use a chat_template that renders tool calls, or remove the row"
            )

    def notes(self, prompt: list[Any], responses: list[list[Any]], rendered: str, texts: list[str]) -> list[str]:
        """What a user should know of a row: `rendered` is its prompt, `texts` are prompt and response.

        The words are the same for all rows of a kind.
        """
        notes = []
        ends = [rendered[common_prefix(rendered, text) :] for text in texts if not text.startswith(rendered)]
        if ends:
            notes.append(
                f"the prompt ends with {max(ends, key=len)!r} for generation, but the chat template does not write "
                "that before the response: it is left out, and the response is scored from there on"
            )
        asked = [message for message in prompt if message["role"] != "assistant"]  # older reasoning goes by intention
        if leaves_out(rendered, asked) or any(map(leaves_out, texts, responses)):
            notes.append(
                "the chat template leaves out text of a message (its reasoning, or a role that it does not render), "
                "so that it is not trained"
            )
        said = [response[-1].get("content") or "" for response in responses]
        if any(last.strip() and text.rstrip().endswith(last.rstrip()) for text, last in zip(texts, said, strict=True)):
            notes.append("the chat template writes nothing after the response, which does not teach where to stop")
        if any(DATE.strftime(call[2]) in rendered for call in TODAY.finditer(self._text)):
            notes.append(f"the chat template writes the day's date: {DATE} stands for it, on all days")
        tools = [str(tool.get("function", tool).get("name")) for tool in self.options.get("tools", ())]
        if any(tool not in rendered for tool in tools):
            notes.append("the chat template leaves out their tools")
        if unread := [name for name in self.options if name != "tools" and name not in self._text]:
            notes.append(f"the chat template does not read the chat_template_kwargs {', '.join(unread)}")
        return notes

    @property
    def _text(self) -> str:
        """The template, or of several the one for the row's options."""
        template = self.tokenizer.chat_template
        return self.tokenizer.get_chat_template(tools=self.options.get("tools")) if template else ""

    def _readable(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message as the template reads it; a tool call without text has the content ""."""
        message = dict(message)
        if calls := message.get("tool_calls"):
            message["content"] = message.get("content") or ""
            message["tool_calls"] = [self._readable_call(call) for call in calls]
        if self.parts and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _readable_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(_function(call))
        arguments = function.get("arguments")
        if self.text_arguments and not isinstance(arguments, str):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not self.text_arguments and isinstance(arguments, str):
            function["arguments"] = json.loads(arguments)
        return {**call, "function": function} if "function" in call else function

    def _shows(self, messages: list[Any]) -> bool:
        try:
            return PROBE in self.render(messages, 0)
        except ValueError:  # not a form that it reads; where it reads none, the first row's error says why
            return False


def common_prefix(a: str, b: str) -> int:
    """How many leading characters two texts share."""
    shorter = min(len(a), len(b))
    # The least length whose starts differ, less one.
    return bisect_left(range(1, shorter + 1), True, key=lambda length: a[:length] != b[:length])


def _function(call: Mapping[str, Any]) -> Any:
    """The name and arguments of a tool call, which stand in its "function" or in itself."""
    return call.get("function", call)


def _renamed(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The message with calls of a function of that name."""
    calls = [(call, {**_function(call), "name": name}) for call in message["tool_calls"]]
    return {**message, "tool_calls": [{**call, "function": f} if "function" in call else f for call, f in calls]}


def _day(call: re.Match[str]) -> str:
    """The date in the format of a matched call of `strftime_now`, as a string of the template."""
    return repr(DATE.strftime(call[2]))


def _around(text: str, place: int) -> str:
    return f"...{text[max(place - 20, 0) : place + 40]!r}..."


def leaves_out(text: str, messages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a rendered `text` lacks what one of the messages says; spaces do not count, nor tools' results."""
    spoken = [message for message in messages if message["role"] != "tool"]  # some write these as JSON
    said = [message[key] for message in spoken for key in SPOKEN if isinstance(message.get(key), str)]
    missing = [part for part in said if part.strip() not in text]
    squeezed = "".join(text.split()) if missing else ""
    return any("".join(part.split()) not in squeezed for part in missing)


def check_tool_calls(message: Mapping[str, Any], name: str) -> None:
    """Errors name the message as `name`."""
    calls = message["tool_calls"]
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise TypeError(f"{name}['tool_calls'] must be a list of dicts, got {describe(calls)}")
    for call in calls:
        function = _function(call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TypeError(f"{name}['tool_calls'] must name a function each, got {describe(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                json.loads(arguments)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}['tool_calls']: arguments={arguments!r} are not JSON: {error}") from error
