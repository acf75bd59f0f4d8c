"""The scored rows of a batch: found with one wait for the device, gathered only where a view will not do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.backend import validate_labels
from fastpref.tiled import check_labels_in_range, scored_labels


@dataclass(frozen=True)
class Rows:
    """N scored rows in the order of the batch; `index` is into the B·T positions."""

    index: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64
    counts: list[int]  # (S,), scored rows of each sequence
    shape: tuple[int, int]  # B, T
    run: int | None  # where the rows begin, if they follow each other without a gap
    shift: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def places(self) -> Tensor:  # (N,)
        """Where their log-probs stand: with their labels."""
        return self.index + self.shift

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
            flat[self.index[start : start + len(values)]] = values.to(out.dtype)
        return out

    def spread(self, values: Tensor, *, mean: bool) -> Tensor:  # (N,)
        """(S,) values of sequences, given to each of their rows; divided by how many there are for a mean."""
        counts = torch.tensor(self.counts, device=values.device)
        if mean:
            values = values / counts.clamp(min=1)
        return values.repeat_interleave(counts, output_size=len(self))


def find_rows(
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    shift: int,
    ignore_index: int,
    vocab: int,
    cu_seqlens: Tensor | None = None,  # (S + 1,), with packed rows (1, N_total)
) -> Rows:
    """The rows that are scored. A label outside [0, V) raises on a CPU and with FASTPREF_VALIDATE=1."""
    scored = scored_labels(labels, mask, ignore_index, shift)  # (B, T - shift)
    if labels.device.type == "cpu" or validate_labels():
        check_labels_in_range(labels, scored, shift, vocab)
    batch, length = labels.shape
    flags = scored.new_zeros(batch, length)
    flags[:, : length - shift] = scored
    flat = flags.flatten()
    counts, run, total = [0] * (batch if cu_seqlens is None else len(cu_seqlens) - 1), None, 0
    if flat.numel():
        # One trip to the host for everything that it has to know.
        ends = [flat.int().argmax()[None], flat.flip(0).int().argmax()[None]]
        *counts, total, first, behind = torch.cat([_counts(flags, cu_seqlens), flat.sum()[None], *ends]).tolist()
        last = flat.numel() - 1 - behind
        run = first if total and last - first + 1 == total else None
    if run is not None:
        index = torch.arange(run, run + total, device=labels.device)
    else:
        # Not nonzero(), which would make a GPU wait a second time.
        index = torch.argsort(~flat, stable=True)[:total]
    return Rows(index, labels.flatten()[index + shift].long(), counts, (batch, length), run, shift)


def _counts(flags: Tensor, cu_seqlens: Tensor | None) -> Tensor:  # (S,)
    if cu_seqlens is None:
        return flags.sum(1)
    ends = torch.nn.functional.pad(flags.flatten().cumsum(0), (1, 0))[cu_seqlens.long()]
    return ends.diff()
