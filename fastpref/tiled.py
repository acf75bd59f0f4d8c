"""Token log-probs in plain torch, tile by tile: the default on a CPU, and the path of devices without Triton.

A tile is a few rows of logits as float32 in one scratch buffer that stays in cache. Forward, per scored row: read it
once, keep its maximum m and s = Σ exp(x − m). Backward: read it once more and write g·(onehot − p) once. Peak
memory beyond the gradient is the scratch buffer (two with a softcap) and eight bytes a position.

Every tile is computed at the same shape, the last one too: a reduction over another shape may sum in another order,
and a row's value must not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastpref.checks import refuse_capture
from fastpref.parallel.vocab import RowStatistics

# A thread's share of a tile, in elements: 2 MiB of float32. With V = 151936 and 512 scored rows, forward and backward
# took 2 cores 0.275 s with 2 rows a tile, 0.205 with 4, 0.209 with 6, 0.198 with 8 (medians of interleaved repeats).
TILE_ELEMENTS_PER_THREAD = 2**19
# More rows than this gain little, and a short batch would pay for the whole tile.
MAX_TILE_ROWS = 64
# A distance from the maximum: exp(−1000) is 0 in every dtype, and 0·(−1000) is not the NaN of 0·(−inf).
NOTHING = -1000.0


@dataclass(frozen=True)
class Transform:
    """z = softcap·tanh(logit_scale·x / softcap) / temperature; a softcap of 0 means none."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float = 0.0

    @property
    def values(self) -> tuple[float, float, float]:
        return self.temperature, self.logit_scale, self.softcap

    def apply_(self, x: Tensor, tanh_out: Tensor | None = None) -> Tensor:
        """Turns x into z in its own memory; `tanh_out` receives the tanh that `chain_` needs.

        A division is not replaced by a product with the rounded reciprocal, which would shift a whole row.
        """
        if self.logit_scale != 1.0:
            x.mul_(self.logit_scale)
        if self.softcap:
            x.div_(self.softcap).tanh_()
            if tanh_out is not None:
                tanh_out.copy_(x)
            x.mul_(self.softcap)
        return x.div_(self.temperature) if self.temperature != 1.0 else x

    def chain_(self, grad: Tensor, tanh: Tensor | None) -> Tensor:
        """Turns dL/dz into dL/dx in its own memory."""
        if tanh is not None:
            grad.mul_(tanh.square_().neg_().add_(1.0))
        slope = self.logit_scale / self.temperature
        return grad.mul_(slope) if slope != 1.0 else grad


def scored_labels(labels: Tensor, mask: Tensor | None, ignore_index: int, shift: int) -> Tensor:
    """(B, T - shift) bool: which rows of logits are scored; row t predicts label t + shift."""
    scored = labels != ignore_index
    if mask is not None:
        scored = scored & mask
    return scored[:, shift:]


def check_labels_in_range(labels: Tensor, scored: Tensor, shift: int, vocab: int) -> None:
    """Raises for the first scored label outside [0, V), with its place. Reads the tensors: a GPU would wait here."""
    refuse_capture(
        "the torch path, and FASTPREF_VALIDATE=1 everywhere, look at labels on the host",
        "take the Triton kernels (FASTPREF_BACKEND=auto, compute capability 8.0 or newer) without FASTPREF_VALIDATE",
    )
    wrong = scored & ((labels[:, shift:] < 0) | (labels[:, shift:] >= vocab))
    if wrong.any():
        b, t = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels[{b}, {t + shift}] is {labels[b, t + shift].item()}, outside [0, V={vocab}); mark positions that "
            "are not scored with ignore_index or mask them, and check that the tokenizer fits the model"
        )


def _tile_rows(vocab: int, device: torch.device) -> int:
    threads = torch.get_num_threads() if device.type == "cpu" else 64
    rows = max(1, min(MAX_TILE_ROWS, TILE_ELEMENTS_PER_THREAD * threads // max(vocab, 1)))
    # Rows are dealt to threads: an uneven number leaves one of them waiting.
    return rows - rows % threads if rows > threads else rows


def _row_groups(scored: Tensor, shift: int, *tensors: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """Scored rows in order, as (row in the whole batch, row in the 2-D views, 2-D views of (B, T, V) `tensors`).

    One group where all tensors can be seen as (B·T, V), else one a sequence: logits[:, :-1] is never copied.
    """
    batch, length = tensors[0].shape[:2]
    flat = scored.new_zeros(batch, length)
    flat[:, : length - shift] = scored
    if all(x.is_contiguous() or batch == 1 or x.stride(0) == length * x.stride(1) for x in tensors):
        rows = flat.flatten().nonzero().flatten()
        yield rows, rows, tuple(x.flatten(0, 1) for x in tensors)
    else:
        for b in range(batch):
            rows = flat[b].nonzero().flatten()
            yield rows + b * length, rows, tuple(x[b] for x in tensors)


def _tiles(rows: Tensor, size: int) -> Iterator[tuple[int, slice | Tensor]]:
    """`rows` in pieces of `size`: how many, and which; a slice where they are neighbours."""
    listed = rows.tolist()
    for start in range(0, len(listed), size):
        stop = min(start + size, len(listed))
        low, high = listed[start], listed[stop - 1]
        neighbours = high - low == stop - start - 1
        yield stop - start, slice(low, high + 1) if neighbours else rows[start:stop]


def _column(values: Tensor, size: int) -> Tensor:
    """(padded, 1), `values` and then zeros to whole tiles of `size`."""
    padded = -(-len(values) // size) * size
    return torch.cat([values, values.new_zeros(padded - len(values))]).unsqueeze(1)


def token_logps_forward(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    shift: int,
    ignore_index: int,
    transform: Transform,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (B, T) where the labels stand, row maxima and sums (B, T) where the rows stand; 0 if not scored."""
    scored = scored_labels(labels, mask, ignore_index, shift)
    check_labels_in_range(labels, scored, shift, logits.shape[2])
    rows = row_statistics(logits, labels, scored, shift, transform)
    logps = torch.zeros_like(rows.maximum)
    length = labels.shape[1]
    logps[:, shift:] = ((rows.target - rows.maximum) - rows.total.log())[:, : length - shift]
    return logps, rows.maximum, rows.total


def row_statistics(
    logits: Tensor,  # (B, T, V), V = 0 too
    labels: Tensor,  # (B, T)
    scored: Tensor,  # (B, T - shift) bool: which rows
    shift: int,
    transform: Transform,
    *,
    weighted: bool = False,
    squares: bool = False,
    sum_z: bool = False,
) -> RowStatistics:  # each (B, T), where the rows stand; those of log-prob 0 and entropy 0 if not scored
    """Of each scored row of logits, in one read of it; the target is anything where the label is outside [0, V)."""
    batch, length, vocab = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    neutral = {"maximum": 0.0, "total": 1.0, "target": 0.0}
    neutral |= {"weighted": 0.0} if weighted else {}
    neutral |= {"squares": 1.0} if squares else {}
    neutral |= {"sum_z": 0.0} if sum_z else {}
    out = {
        name: torch.full((batch * length,), value, dtype=dtype, device=logits.device) for name, value in neutral.items()
    }
    size = _tile_rows(vocab, logits.device)
    tile = torch.zeros(size, vocab, dtype=dtype, device=logits.device)
    powers = torch.zeros_like(tile) if weighted or squares else tile
    lowest = torch.finfo(dtype).min

    for place, rows, (x,) in _row_groups(scored, shift, logits):
        if len(rows) == 0:
            continue
        if vocab == 0:
            for name, values in out.items():
                values[place] = -torch.inf if name == "maximum" else 0.0
            continue
        targets = labels.flatten()[place + shift].long().clamp(0, vocab - 1).unsqueeze(1)
        columns = {name: tile.new_zeros(-(-len(rows) // size), size, 1) for name in out}
        first = 0
        for i, (count, which) in enumerate(_tiles(rows, size)):
            transform.apply_(tile[:count].copy_(x[which]))
            columns["target"][i, :count] = tile[:count].gather(1, targets[first : first + count])
            first += count
            if sum_z:
                torch.sum(tile, 1, keepdim=True, out=columns["sum_z"][i])
            maximum = torch.amax(tile, 1, keepdim=True, out=columns["maximum"][i])
            # A part of the vocabulary that is all −inf is a sum of 0, not NaN.
            tile.sub_(maximum.clamp(min=lowest))
            torch.exp(tile if powers is tile else tile.clamp_(min=NOTHING), out=powers)
            torch.sum(powers, 1, keepdim=True, out=columns["total"][i])
            if weighted:
                torch.sum(tile.mul_(powers), 1, keepdim=True, out=columns["weighted"][i])
            if squares:
                torch.sum(powers.square_(), 1, keepdim=True, out=columns["squares"][i])
        for name, values in out.items():
            values[place] = columns[name].flatten()[: len(place)]
    return RowStatistics(**{name: values.view(batch, length) for name, values in out.items()})


def token_logps_backward(
    grad: Tensor,  # (B, T), where the labels stand; any strides
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    row_max: Tensor,  # (B, T), where the rows stand
    row_sum: Tensor,  # (B, T)
    shift: int,
    ignore_index: int,
    transform: Transform,
    inplace: bool,
    entropy: Tensor | None = None,  # (B, T), where the labels stand
    grad_entropy: Tensor | None = None,  # (B, T), any strides
) -> Tensor:  # (B, T, V)
    """g·(onehot − p) − g_H·p·(log p + H) through the transform; into the logits' own memory if `inplace`.

    A label outside [0, V) has its entry in another part of the vocabulary.
    """
    vocab = logits.shape[2]
    out = logits if inplace else zeros_untouched(logits)
    if vocab == 0:
        return out
    scored = scored_labels(labels, mask, ignore_index, shift)
    if inplace:
        _zero_other_rows(out, scored)
    size = _tile_rows(vocab, logits.device)
    tile = torch.zeros(size, vocab, dtype=row_max.dtype, device=logits.device)
    tanh = torch.empty_like(tile) if transform.softcap else None
    powers = torch.empty_like(tile) if grad_entropy is not None else None

    for place, rows, (x, dx) in _row_groups(scored, shift, logits, out):
        if len(rows) == 0:
            continue
        targets = labels.flatten()[place + shift].long()
        inside = (targets >= 0) & (targets < vocab)
        here = slice(None) if inside.all() else inside.nonzero().flatten()
        upstream = grad.flatten()[place + shift].to(row_max.dtype)
        maximum, total = row_max.flatten()[place], row_sum.flatten()[place]
        columns = [maximum, -upstream / total]
        # The label's own entry is g·(1 − p), from one rounding of p − 1; read before `out` can overwrite it.
        picked = x[rows[here], targets[here]].to(row_max.dtype)
        picked_tanh = torch.empty_like(picked) if transform.softcap else None
        distance = transform.apply_(picked, picked_tanh) - maximum[here]
        p = torch.exp(distance) / total[here]
        own = upstream[here] * (1.0 - p)
        if entropy is not None and grad_entropy is not None:
            # −p·(g + g_H·(log p + H)), with log p + H = (z − m) + (H − log s)
            bonus = grad_entropy.flatten()[place + shift].to(row_max.dtype)
            level = entropy.flatten()[place + shift] - total.log()
            own -= p * bonus[here] * (distance.clamp(min=NOTHING) + level[here])
            columns += [-bonus / total, level]
        transform.chain_(own, picked_tanh)

        for (count, which), tile_max, tile_scale, *more in zip(
            _tiles(rows, size), *(_column(values, size).split(size) for values in columns), strict=True
        ):
            transform.apply_(tile[:count].copy_(x[which]), None if tanh is None else tanh[:count])
            tile.sub_(tile_max)
            if powers is None:
                tile.exp_().mul_(tile_scale)
            else:
                tile_bonus, tile_level = more
                torch.exp(tile.clamp_(min=NOTHING), out=powers)
                tile.add_(tile_level).mul_(tile_bonus).add_(tile_scale).mul_(powers)
            transform.chain_(tile, tanh)
            dx[which] = tile[:count] if isinstance(which, slice) else tile[:count].to(dx.dtype)
        dx[rows[here], targets[here]] = own.to(dx.dtype)
    return out


def zeros_untouched(like: Tensor) -> Tensor:
    """Zeros of the shape of `like`, contiguous.

    On a CPU they come from NumPy, which takes them from the system as untouched zero pages (large ones where there are
    such): rows that are not scored cost neither the time to write them nor, until somebody reads them, memory.
    """
    if like.device.type != "cpu":
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    if like.numel() == 0:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    pages = np.zeros(like.numel() * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(pages).view(like.dtype).view(like.shape)


def _zero_other_rows(out: Tensor, scored: Tensor) -> None:
    """Zeroes each run of rows that are not scored; `scored` is (B, T - shift), rows beyond it are not scored."""
    for b, flags in enumerate(scored.tolist()):
        start = 0
        for t, flag in enumerate([*flags, *[False] * (out.shape[1] - len(flags)), True]):
            if flag:
                if t > start:
                    out[b, start:t].zero_()
                start = t + 1
