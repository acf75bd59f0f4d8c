"""A pair as the model sees it: token by token, the scored ones marked, so that a wrong template or border is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpref.training.data import Pair, Response

# Tokens shown at the beginning and the end of a prompt, and of a response; the border of the two is always there.
PROMPT, RESPONSE = (16, 24), (40, 16)
BORDER, OPEN, CLOSE = "│", "⟦", "⟧"  # which no tokenizer's special tokens have
CONTINUED = "⋯"
CHARACTER = 4  # bytes, so tokens, at most
BROKEN = "\N{REPLACEMENT CHARACTER}"
PARTS = f"{BORDER} parts tokens, {CONTINUED} goes on with a character"
LEGEND = {
    True: f"{PARTS}; those in green are scored",
    False: f"{PARTS}; those in {OPEN}brackets{CLOSE} are scored",
}


def show_pair(pair: Pair, tokenizer: Any, *, max_length: int, color: bool) -> list[str]:
    """Lines of text; with `color` they hold ANSI codes."""
    lines = [f"the first pair (row {pair.row}), as the model sees it: {LEGEND[color]}"]
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        whole, scored = len(response.ids), len(response.ids) - max(response.start, 1)
        cut = f", at max_length={max_length}" if whole == max_length else ""
        lines += [f"{name}: {whole} tokens, {scored} scored{cut}", _marked(response, tokenizer, color=color)]
    return lines


def _marked(response: Response, tokenizer: Any, *, color: bool) -> str:
    # The first token of a sequence is predicted by nothing: it is not scored.
    start = max(response.start, 1)
    prompt = _elided(pieces(tokenizer, response.ids[:start].tolist()), *PROMPT)
    answer = _elided(pieces(tokenizer, response.ids[start:].tolist()), *RESPONSE)
    if color:
        border = f"\x1b[90m{BORDER}\x1b[39m"
        return border.join([*prompt, *(f"\x1b[32m{text}\x1b[39m" for text in answer)])
    return f"{BORDER.join(prompt)}{OPEN}{BORDER.join(answer)}{CLOSE}"


def _elided(pieces: Sequence[str], first: int, last: int) -> list[str]:
    hidden = len(pieces) - first - last
    if hidden <= 1:
        return list(pieces)
    return [*pieces[:first], f" ... {hidden} tokens ... ", *pieces[-last:]]


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; a character of several tokens stands at its first, and CONTINUED at the others."""
    found: list[str] = []
    while len(found) < len(tokens):
        rest = tokens[len(found) : len(found) + CHARACTER]
        whole = next((n for n in range(1, len(rest) + 1) if BROKEN not in _decoded(tokenizer, rest[:n])), 1)
        if whole == 1:
            found.append(piece(tokenizer, rest[0]))
        else:
            found += [_decoded(tokenizer, rest[:whole]), *[CONTINUED] * (whole - 1)]
    return found


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def piece(tokenizer: Any, token: int) -> str:
    """A token's text on one line, spaces and special tokens included; a part of a character by its raw name."""
    raw = str(tokenizer.convert_ids_to_tokens(token))
    # SentencePiece's space is one that decoding a single token would take away.
    text = raw.replace("▁", " ") if "▁" in raw else _decoded(tokenizer, [token])
    if not text or BROKEN in text:
        text = f"<{raw}>"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
