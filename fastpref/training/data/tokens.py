"""From text to token ids: special tokens, the border of prompt and response, truncation, what is dropped."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastpref.models import shared_length
from fastpref.training.data.formats import RenderedPair, render_row
from fastpref.training.data.templates import ChatTemplate, common_prefix

CHUNK = 256  # rows tokenised in one call: enough to keep a fast tokenizer's threads busy

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

    @property
    def length(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))

    @property
    def shared(self) -> int:
        """Tokens that both sequences begin with: the prompt's, and perhaps more."""
        return shared_length(self.chosen.ids, self.rejected.ids)


@dataclass
class PairSet:
    """What became of a dataset: its pairs in order, and the rows that were left out or cut, by index."""

    pairs: list[Pair]
    rows: int
    no_room: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    truncated: int = 0
    other_turns: int = 0
    rewritten: Counter[str] = field(default_factory=Counter)  # ends of prompts that their responses do not follow
    left_out: list[int] = field(default_factory=list)

    def report(self, name: str, max_length: int) -> list[str]:
        """Lines for the user: nothing is dropped or cut without being counted."""
        lines = [f"{name}: {len(self.pairs)} pairs of {self.rows} rows"]
        if self.no_room:
            lines.append(
                f"{name}: dropped {len(self.no_room)} rows whose prompt leaves no room for a response within "
                f"max_length={max_length}: {_some(self.no_room)}"
            )
        if self.empty:
            lines.append(f"{name}: dropped {len(self.empty)} rows with a response of no tokens: {_some(self.empty)}")
        if self.truncated:
            lines.append(f"{name}: cut the end of {self.truncated} responses to fit max_length={max_length}")
        if self.other_turns:
            lines.append(
                f"{name}: {self.other_turns} rows have turns other than the assistant's in a response; all "
                "of a response's tokens are scored"
            )
        if self.rewritten:
            end, count = self.rewritten.most_common(1)[0]
            lines.append(
                f"{name}: in {self.rewritten.total()} rows the chat template rewrites the end of the prompt where a "
                f"response follows ({end!r} in {count}): that end is left out, and a response is scored from there on, "
                "but generating starts after it"
            )
        if self.left_out:
            lines.append(
                f"{name}: in {len(self.left_out)} rows the chat template leaves out text of a response, such as its "
                f"reasoning, so that it is not trained: {_some(self.left_out)}"
            )
        return lines


def tokenize_rows(rows: Sequence[Any], tokenizer: Any, *, max_length: int, name: str = "dataset") -> PairSet:
    """Tokenise every row of a dataset.

    The prompt and the prompt with its response are tokenised apart, and the border is their longest common
    token prefix: where a token spans the end of the prompt, it counts as the response's, and where a chat template
    rewrites the generation prompt before a response, the response begins there. Plain text gets what
    the tokenizer adds (a BOS where it is made so, never two) and an end-of-sequence token if it has none yet;
    a chat template has written its own. Sequences are cut at their end to `max_length` tokens. A row is
    dropped when either response is left without a token that can be scored.

    Raises:
        ValueError, TypeError: a row is malformed (named by its index), or no row is left.
    """
    result = PairSet(pairs=[], rows=len(rows))
    first: tuple[bool, bool] | None = None
    template = ChatTemplate.of(tokenizer)
    for begin in range(0, len(rows), CHUNK):
        chunk = [(index, rows[index]) for index in range(begin, min(begin + CHUNK, len(rows)))]
        rendered = [render_row(row, index, template) for index, row in chunk]
        references = [_given_reference(row, index) for index, row in chunk]
        for text, reference in zip(rendered, references, strict=True):
            kind = (text.conversational, reference is not None)
            first = first or kind
            if kind != first:
                raise ValueError(
                    f"row {text.row} differs in form from row 0: all rows must be text or all messages, and "
                    "all or none must have ref_chosen_logps and ref_rejected_logps"
                )
        for pair, reference in zip(_encode(rendered, tokenizer, max_length, result), references, strict=True):
            if pair is not None:
                chosen, rejected = reference or (None, None)
                result.pairs.append(replace(pair, ref_chosen_logp=chosen, ref_rejected_logp=rejected))
    if not result.pairs:
        raise ValueError(". ".join([f"{name} holds no pair to train on", *result.report(name, max_length)]))
    return result


def _encode(
    rendered: list[RenderedPair],  # all text, or all rendered by a chat template
    tokenizer: Any,
    max_length: int,
    result: PairSet,
) -> list[Pair | None]:
    """The pairs of a chunk, None for a dropped one; what is dropped or cut is counted in `result`."""
    plain = not rendered[0].conversational
    prompts = _ids(tokenizer, [text.prompt for text in rendered], special=plain)
    chosen = _ids(tokenizer, [text.chosen for text in rendered], special=plain)
    rejected = _ids(tokenizer, [text.rejected for text in rendered], special=plain)
    pairs: list[Pair | None] = []
    for text, prompt, *wholes in zip(rendered, prompts, chosen, rejected, strict=True):
        responses = [(ids, common_prefix(prompt, ids)) for ids in wholes]
        if plain:
            responses = [_with_eos(ids, start, tokenizer.eos_token_id) for ids, start in responses]
        # The first token of a sequence has no position that predicts it: it can not be scored.
        begins = [max(start, 1) for _, start in responses]
        if any(len(ids) <= begin for (ids, _), begin in zip(responses, begins, strict=True)):
            result.empty.append(text.row)
            pairs.append(None)
        elif max_length <= max(begins):
            result.no_room.append(text.row)
            pairs.append(None)
        else:
            result.truncated += sum(len(ids) > max_length for ids, _ in responses)
            result.other_turns += text.other_turns
            if text.rewritten:
                result.rewritten[tokenizer.decode(prompt[min(start for _, start in responses) :])] += 1
            if text.left_out:
                result.left_out.append(text.row)
            parts = [Response(np.array(ids[:max_length], dtype=np.int32), start) for ids, start in responses]
            # Where a token spans the prompt's end, a sample starts before it.
            shared = np.array(prompt[: min(start for _, start in responses)], dtype=np.int32)
            pairs.append(Pair(text.row, shared, parts[0], parts[1]))
    return pairs


def _ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    """Token ids, with the tokenizer's own special tokens if `special`, but never a doubled BOS."""
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded]


def _with_eos(ids: list[int], start: int, eos: int | None) -> tuple[list[int], int]:
    """The ids with the end-of-sequence token last, where there is one; and where the response starts."""
    if eos is None:
        return ids, start
    if ids and ids[-1] == eos:  # the tokenizer adds it: it is the response's, even of an empty one
        return ids, min(start, len(ids) - 1)
    return [*ids, eos], start


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
    shown = ", ".join(map(str, rows[:10]))
    return shown if len(rows) <= 10 else f"{shown}, ... ({len(rows)} in all)"


def data_digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 of token ids and borders: it changes with whatever tokenizer, template or truncation change."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids, start in (pair.chosen, pair.rejected):
            digest.update(f"{len(ids)} {start} ".encode())
            digest.update(ids.tobytes())
    return digest.hexdigest()
