"""From text to token ids: special tokens, the border of prompt and response, truncation, what is dropped."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastpref.models import shared_length
from fastpref.training.data.formats import (
    NO_PROMPT,
    RenderedPair,
    in_order,
    naming_file,
    render_row,
    repeats_prompt,
    unused_columns,
)
from fastpref.training.data.templates import ChatTemplate

CHUNK = 256  # rows tokenised in one call: enough to keep a fast tokenizer's threads busy
# A response may change the tokens at the prompt's end: one that spans the border, or those of a generation prompt that
# the chat template rewrites. A prompt longer than max_length by this has no room, whatever its last tokens become.
BORDER_TOKENS = 64
SHOWN = 10  # rows in a line of the report
SURROGATE = re.compile("[\ud800-\udfff]")

Ids = NDArray[np.int32]


class Response(NamedTuple):
    """The tokens of prompt and response; those from `start` on are the response's, and are scored."""

    ids: Ids  # (length,)
    start: int


@dataclass(frozen=True)
class Pair:
    """One tokenised row. `row` is its index in the dataset; `ref_*` are None until they are known."""

    row: int
    prompt: Ids
    chosen: Response
    rejected: Response
    ref_chosen_logp: float | None = None
    ref_rejected_logp: float | None = None
    desirable: bool | None = None  # of unpaired data: chosen's label, and rejected is a mismatched response

    @property
    def length(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))

    @property
    def shared(self) -> int:
        """Tokens that both sequences begin with: the prompt's, and perhaps more."""
        return shared_length(self.chosen.ids, self.rejected.ids)


Rendered = tuple[RenderedPair, tuple[float, float] | None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class PairSet:
    """What became of a dataset: its pairs in order, and the rows that were left out or cut, by index."""

    pairs: list[Pair]
    rows: int
    no_room: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    truncated: int = 0
    notes: dict[str, list[int]] = field(default_factory=dict)  # what else a user should know, and of which rows
    unused: list[str] = field(default_factory=list)  # columns

    def report(self, name: str, max_length: int) -> list[str]:
        """Lines for the user: nothing is dropped, cut or read otherwise than it stands without being counted."""
        lines = [f"{name}: {len(self.pairs)} pairs of {self.rows} rows"]
        if self.unused:
            lines.append(f"{name}: columns that are not used: {', '.join(self.unused)}")
        for note, rows in self.notes.items():
            which = "all rows" if len(rows) == self.rows else f"{len(rows)} rows ({_some(rows)})"
            lines.append(f"{name}: in {which} {note}")
        if self.no_room:
            lines.append(
                f"{name}: dropped {len(self.no_room)} rows whose prompt leaves no room for a response within "
                f"max_length={max_length}: {_some(self.no_room)}"
            )
        if self.empty:
            lines.append(f"{name}: dropped {len(self.empty)} rows with a response of no tokens: {_some(self.empty)}")
        if self.truncated:
            lines.append(f"{name}: cut the end of {self.truncated} responses to fit max_length={max_length}")
        return lines

    def note(self, text: str, row: int) -> None:
        self.notes.setdefault(text, []).append(row)


def tokenize_rows(rows: Sequence[Any], tokenizer: Any, *, max_length: int, name: str = "dataset") -> PairSet:
    """Tokenise every row of a dataset.

    The prompt and the prompt with its response are tokenised apart, and the border is their longest common
    token prefix: where a token spans the end of the prompt, it counts as the response's, and where a chat template
    rewrites the generation prompt before a response, the response begins there. Plain text gets what
    the tokenizer adds (a BOS where it is made so, never two) and an end-of-sequence token if it has none yet;
    a chat template has written its own. Sequences are cut at their end to `max_length` tokens. A row is
    dropped when either response is left without a token that can be scored.

    Raises:
        ValueError, TypeError: a row is malformed (named by its index, and its file where there is one), or no row is
            left.
    """
    result = PairSet(pairs=[], rows=len(rows), unused=unused_columns(rows[0]))
    seen: set[int] = set()
    for chunk, encoded in _one_ahead(
        lambda chunk: _encode([text for text, _ in chunk], tokenizer, max_length),
        _chunks(rows, ChatTemplate.of(tokenizer), result),
    ):
        for (text, reference), ids in zip(chunk, encoded, strict=True):
            pair = _pair(text, *ids, tokenizer, max_length, result)
            if pair is not None:
                content = hash((pair.chosen.ids.tobytes(), pair.chosen.start, pair.rejected.ids.tobytes()))
                if content in seen:
                    result.note("the pair is that of an earlier row", text.row)
                seen.add(content)
                chosen, rejected = reference or (None, None)
                result.pairs.append(replace(pair, ref_chosen_logp=chosen, ref_rejected_logp=rejected))
    _check_prompts(result, rows[0], name)
    if not result.pairs:
        raise ValueError(". ".join([f"{name} holds no pair to train on", *result.report(name, max_length)]))
    return result


def _chunks(rows: Sequence[Any], template: ChatTemplate, result: PairSet) -> Iterator[list[Rendered]]:
    """Rows as text, with the reference's log-probs where they have them; notes on them go to `result`."""
    repeated = all(map(repeats_prompt, in_order(rows)))  # of one row alone it may be meant; the first without ends it
    first: tuple[bool, bool, bool] | None = None
    chunk: list[Rendered] = []
    for index, row in enumerate(in_order(rows)):
        with naming_file(rows, index):
            text = _whole_characters(render_row(row, index, template, repeated=repeated), result)
            reference = _given_reference(row, index)
            kind = (text.conversational, text.implicit, reference is not None)
            first = first or kind
            if kind != first:
                raise ValueError(
                    f"row {index} differs in form from row 0: all rows must be text or all messages, all or none must "
                    "have a prompt, and all or none ref_chosen_logps and ref_rejected_logps"
                )
        for note in text.notes:
            result.note(note, index)
        chunk.append((text, reference))
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _whole_characters(text: RenderedPair, result: PairSet) -> RenderedPair:
    """Half an emoji, left by a text cut within a UTF-16 pair, has no tokens: U+FFFD stands for it."""
    if not any(map(SURROGATE.search, (text.chosen, text.rejected))):
        return text
    result.note("half a character (a lone surrogate) was replaced by U+FFFD", text.row)
    prompt, chosen, rejected = (SURROGATE.sub("\ufffd", part) for part in (text.prompt, text.chosen, text.rejected))
    return text._replace(prompt=prompt, chosen=chosen, rejected=rejected)


def _one_ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Each item with what `work` makes of it, in a thread that has the next item meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > 1:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()


def _encode(
    texts: list[RenderedPair],  # all plain, or all rendered by a chat template
    tokenizer: Any,
    max_length: int,
) -> list[tuple[Ids, list[Ids]]]:
    """Token ids of each row's prompt and of its two sequences; of none where the prompt is far too long."""
    plain = not texts[0].conversational
    prompts = _ids(tokenizer, [text.prompt for text in texts], special=plain)
    fits = [len(prompt) < max_length + BORDER_TOKENS for prompt in prompts]
    wholes = [whole for text, fit in zip(texts, fits, strict=True) if fit for whole in (text.chosen, text.rejected)]
    found = iter(_ids(tokenizer, wholes, special=plain))
    return [(prompt, [next(found), next(found)] if fit else []) for prompt, fit in zip(prompts, fits, strict=True)]


def _pair(
    text: RenderedPair, prompt: Ids, wholes: list[Ids], tokenizer: Any, max_length: int, result: PairSet
) -> Pair | None:
    """None for a dropped row; what is dropped or cut is counted in `result`."""
    responses = [(ids, shared_length(prompt, ids)) for ids in wholes]
    if not text.conversational:
        responses = [_with_eos(ids, start, tokenizer.eos_token_id) for ids, start in responses]
    # The first token of a sequence has no position that predicts it: it can not be scored.
    begins = [max(start, 1) for _, start in responses]
    if any(len(ids) <= begin for (ids, _), begin in zip(responses, begins, strict=True)):
        result.empty.append(text.row)
        return None
    if not begins or max_length <= max(begins):
        result.no_room.append(text.row)
        return None
    result.truncated += sum(len(ids) > max_length for ids, _ in responses)
    border = min(start for _, start in responses)  # where a token spans the prompt's end, a sample starts before it
    chosen, rejected = (Response(ids[:max_length], start) for ids, start in responses)
    if np.array_equal(chosen.ids, rejected.ids):
        result.note("chosen and rejected are the same tokens", text.row)
    return Pair(text.row, prompt[:border], chosen, rejected)


def _check_prompts(result: PairSet, row: Any, name: str) -> None:
    """Raise ValueError where most rows have no prompt, and columns that may be it were left out."""
    promptless = result.notes.get(NO_PROMPT, [])
    others = [column for column in result.unused if isinstance(row[column], (str, list))]
    if others and 2 * len(promptless) >= result.rows:
        raise ValueError(
            f"{name}: {len(promptless)} of {result.rows} rows have no prompt: there is no column 'prompt', and their "
            f"responses begin differently. If {' or '.join(others)} is the prompt, name it, as columns="
            f'\'{{"prompt": "{others[0]}"}}\'; if not, remove these columns from the dataset'
        )


def _ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[Ids]:
    """Token ids, with the tokenizer's own special tokens if `special`, but never a doubled BOS."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [np.array(ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids, dtype=np.int32) for ids in encoded]


def _with_eos(ids: Ids, start: int, eos: int | None) -> tuple[Ids, int]:
    """The ids with the end-of-sequence token last, where there is one; and where the response starts."""
    if eos is None:
        return ids, start
    if len(ids) and ids[-1] == eos:  # the tokenizer adds it: it is the response's, even of an empty one
        return ids, min(start, len(ids) - 1)
    return np.append(ids, np.int32(eos)), start


def _given_reference(row: Any, index: int) -> tuple[float, float] | None:
    """The reference's log-probs, where the dataset brings them."""
    values = [row.get("ref_chosen_logps"), row.get("ref_rejected_logps")]
    if values == [None, None]:
        return None
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"row {index}: ref_chosen_logps and ref_rejected_logps must both be numbers, got {values}")
    return float(values[0]), float(values[1])


def _some(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:SHOWN]))
    return shown if len(rows) <= SHOWN else f"{shown}, ..."


def data_digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 of token ids and borders: it changes with whatever tokenizer, template or truncation change."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids, start in (pair.chosen, pair.rejected):
            digest.update(f"{len(ids)} {start} ".encode())
            digest.update(ids.tobytes())
        if pair.desirable is not None:
            digest.update(b"+" if pair.desirable else b"-")
    return digest.hexdigest()
