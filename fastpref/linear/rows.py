"""The scored rows of a batch: found with one wait for the device, gathered only where a view will not do."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastpref.backend import validate_labels
from fastpref.checks import refuse_capture
from fastpref.tiled import check_labels_in_range, scored_labels

# Rows that are converted or gathered at a time: what that takes besides stays small beside a tile.
PIECE = 1024
# Rows of the head that are gathered at a time, and widened.
GATHERED = 256


@dataclass(frozen=True)
class Rows:
    """N scored rows in the order of the batch; `index` is into the B·T positions."""

    index: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64
    counts: list[int]  # (S,), scored rows of each sequence
    lengths: Tensor  # the same on the device
    shape: tuple[int, int]  # B, T
    run: int | None  # where the rows begin, if they follow each other without a gap
    shift: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def places(self) -> Tensor:  # (N,)
        """Where their log-probs stand: with their labels."""
        return self.index + self.shift

    def spread_out(self, values: Tensor, labels: Tensor) -> Tensor:  # (B, T)
        """(N,) values where their labels stand, 0 or False elsewhere."""
        out = values.new_zeros(labels.numel())
        out[self.places] = values
        return out.view(labels.shape)

    def gather(self, x: Tensor, start: int, stop: int) -> Tensor:  # (stop - start, W)
        """Rows start..stop of x (B, T, W): a view where they follow each other in memory."""
        batch, length = self.shape
        flat = batch == 1 or length == 1 or x.stride(0) == length * x.stride(1)
        if flat:
            view = x.flatten(0, 1)
            if self.run is not None:
                return view[self.run + start : self.run + stop]
            return view[self.index[start:stop]]
        index = self.index[start:stop]
        return x[index // length, index % length]

    def scatter(self, values: Tensor, out: Tensor, *, start: int = 0) -> Tensor:
        """Writes `values` (n, W) to rows start..start + n of `out` (B, T, W), which is contiguous."""
        flat = out.flatten(0, 1)
        if self.run is not None:
            flat[self.run + start : self.run + start + len(values)] = values
        else:
            for low in range(0, len(values), PIECE):
                piece = values[low : low + PIECE]
                flat[self.index[start + low : start + low + len(piece)]] = piece.to(out.dtype)
        return out

    def spread(self, values: Tensor, *, mean: bool) -> Tensor:  # (N,)
        """(S,) values of sequences, given to each of their rows; divided by how many there are for a mean."""
        if mean:
            values = values / self.lengths.clamp(min=1)
        return values.repeat_interleave(self.lengths, output_size=len(self))


def find_rows(
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    shift: int,
    ignore_index: int,
    vocab: int,
    cu_seqlens: Tensor | None = None,  # (S + 1,), with packed rows (1, N_total)
) -> Rows:
    """The rows that are scored. A label outside [0, V) raises on a CPU and with FASTPREF_VALIDATE=1."""
    refuse_capture(
        "the linear path counts the scored rows on the host",
        "capture the model's layers alone and call it outside of the graph, or take the path from logits "
        "(fastpref.sequence_logps), which can be captured",
    )
    scored = scored_labels(labels, mask, ignore_index, shift)  # (B, T - shift)
    if labels.device.type == "cpu" or validate_labels():
        check_labels_in_range(labels, scored, shift, vocab)
    batch, length = labels.shape
    flags = scored.new_zeros(batch, length)
    flags[:, : length - shift] = scored
    flat, lengths = flags.flatten(), _lengths(flags, cu_seqlens)
    if flat.numel() == 0:
        empty = torch.zeros(0, dtype=torch.long, device=labels.device)
        return Rows(empty, empty, [0] * len(lengths), lengths, (batch, length), None, shift)
    # One trip to the host for everything that it has to know.
    ends = [flat.sum()[None], flat.int().argmax()[None], flat.flip(0).int().argmax()[None]]
    offsets = [] if cu_seqlens is None else [cu_seqlens.long()]
    known = torch.cat([lengths, *ends, *offsets]).tolist()
    counts, (total, first, behind), given = known[: len(lengths)], known[len(lengths) :][:3], known[len(lengths) + 3 :]
    # On a GPU nobody has looked at the offsets before.
    if given and (given[0] != 0 or given[-1] != flat.numel() or any(a > b for a, b in pairwise(given))):
        raise ValueError(
            f"cu_seqlens must begin with 0, never decrease and end with N_total = {flat.numel()}, got {given[:20]}"
        )
    last = flat.numel() - 1 - behind
    run = first if total and last - first + 1 == total else None
    if run is not None:
        index = torch.arange(run, run + total, device=labels.device)
    else:
        # Not nonzero(), which would make a GPU wait a second time.
        index = torch.argsort(~flat, stable=True)[:total]
    return Rows(index, labels.flatten()[index + shift].long(), counts, lengths, (batch, length), run, shift)


def _lengths(flags: Tensor, cu_seqlens: Tensor | None) -> Tensor:  # (S,)
    if cu_seqlens is None:
        return flags.sum(1)
    before = torch.nn.functional.pad(flags.flatten().cumsum(0), (1, 0))
    # Offsets are not looked at on a GPU: clamped they cannot read elsewhere, and what they give is checked.
    return before[cu_seqlens.long().clamp(0, flags.numel())].diff()
