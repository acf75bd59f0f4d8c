"""Unpaired data, for kto: rows with a prompt, a completion and a label, or the two responses of a pair each.

The KL estimate of the loss is the mean log-ratio of mismatched pairs, a prompt and the response to another one. Which
one is fixed for a run by its seed, so that the reference scores it once, with the row's own response. The two are kept
as a pair: `chosen` is the row's own response, desirable or not, and `rejected` the mismatched one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastpref.checks import describe
from fastpref.losses import LossSpec
from fastpref.training.data.sources import Rows
from fastpref.training.data.tokens import Pair

NEAR = 16  # rows that are tried for a response to another prompt


class MismatchedRows(list[dict[str, Any]]):
    """Rows as pairs of a response and a mismatched one, and the label of each."""

    def __init__(self, rows: Sequence[dict[str, Any]], desirable: Sequence[bool]) -> None:
        super().__init__(rows)
        self.desirable = desirable


def fit_rows(rows: Rows, spec: LossSpec, name: str, *, seed: int, say: Callable[[str], None]) -> Rows:
    """The rows as the loss takes them: for an unpaired one each response with a mismatched one, else as they are.

    Raises:
        ValueError, TypeError: a row is malformed (named by its index), or the loss is of pairs and the rows are not.
    """
    single = isinstance(rows[0], Mapping) and "completion" in rows[0] and "chosen" not in rows[0]
    if not spec.unpaired:
        if single:
            raise ValueError(
                f"{name} holds single responses ({', '.join(map(str, rows[0]))}), and loss {spec.name!r} compares two: "
                "set loss=kto, for rows of prompt, completion and label"
            )
        return rows
    found = list(_labelled(rows) if single else _split(rows))
    if len(found) < 2:
        raise ValueError(f"{name}: the KL estimate of {spec.name!r} needs at least 2 responses, got {len(found)}")
    desirable = [label for _, _, label in found]
    good = sum(desirable)
    split = "" if single else f", the two of each pair (row i as {name}'s rows 2i and 2i + 1)"
    say(f"{name}: {good:,} desirable and {len(found) - good:,} undesirable responses{split}")
    others = _mismatched([row["prompt"] for row, _, _ in found], seed)
    pairs = [
        {**row, "chosen": response, "rejected": found[other][1]}
        for (row, response, _), other in zip(found, others, strict=True)
    ]
    return MismatchedRows(pairs, desirable)


def with_labels(pairs: list[Pair], rows: Rows) -> list[Pair]:
    """The pairs that came of `rows`, with the label of each where these have one."""
    if not isinstance(rows, MismatchedRows):
        return pairs
    return [dataclasses.replace(pair, desirable=rows.desirable[pair.row]) for pair in pairs]


def _labelled(rows: Rows) -> Iterator[tuple[dict[str, Any], Any, bool]]:
    """Each row without its response, that, and its label."""
    for index, row in enumerate(rows):
        given = _checked(row, index, ("prompt", "completion", "label"))
        label = given.pop("label")
        if not isinstance(label, bool) and label not in (0, 1):
            raise TypeError(f"row {index}: label must be true (desirable) or false, got {describe(label)}")
        response = given.pop("completion")
        yield given, response, bool(label)


def _split(rows: Rows) -> Iterator[tuple[dict[str, Any], Any, bool]]:
    """A pair's chosen response, which is desirable, and then its rejected one, which is not."""
    for index, row in enumerate(rows):
        given = _checked(row, index, ("prompt", "chosen", "rejected"))
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if given.pop(name, None) is not None:
                raise ValueError(f"row {index}: {name} cannot be used: kto needs mismatched responses scored too")
        chosen, rejected = given.pop("chosen"), given.pop("rejected")
        yield given, chosen, True
        yield given, rejected, False


def _checked(row: Any, index: int, names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise TypeError(f"row {index} must be a dict with {', '.join(names)}, got {describe(row)}")
    for name in names:
        if row.get(name) is None:
            columns = ", ".join(map(str, row)) or "none"
            raise ValueError(f"row {index} has no {name!r}, which loss 'kto' needs; its columns are {columns}")
    return dict(row)


def _mismatched(prompts: Sequence[Any], seed: int) -> list[int]:
    """For each row another one whose response it gets: every response once, but for prompts that are the same."""
    order: list[int] = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    others = [0] * len(prompts)
    for place, index in enumerate(order):
        near = [order[place - step] for step in range(1, min(len(order), NEAR + 1))]
        others[index] = next((other for other in near if prompts[other] != prompts[index]), near[0])
    return others
