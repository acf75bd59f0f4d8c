"""The two sweeps over the vocabulary that every plan is made of.

`fold_sweep` makes each tile of logits once and folds it into the rows' statistics; on the way it can keep the tiles, or
gather dh as attention gathers its output. `gradient_sweep` makes each tile of dz, from a kept tile or from its logits
once more, and multiplies it into dW and dh. Both run over a span of rows with tiles of the plan's size, so that the
memory beyond results is the scratch of one tile.

dz = onehot − softmax is the derivative of a row's log-prob by its logits; `upstream` is that of a loss by log-probs
(entropy.py: and by entropies). Where the vocabulary is split over ranks, each sweeps its own part, and `fold_sweep`
makes of the rows' statistics those of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.linear.entropy import Upstream, own_slope, row_scales
from fastpref.linear.operands import Head, HiddenRows, Kept, Scratch
from fastpref.linear.plan import Plan
from fastpref.linear.products import multiply
from fastpref.linear.rows import GATHERED, Rows
from fastpref.linear.statistics import Finished, Statistics
from fastpref.linear.tiles import fold, gradient_from_kept, gradient_from_logits
from fastpref.parallel.groups import sum_over


def fold_sweep(
    hidden: Tensor,  # (B, T, H)
    rows: Rows,
    head: Head,
    plan: Plan,
    *,
    start: int = 0,
    stop: int | None = None,
    kept: Kept | None = None,
    dh: Tensor | None = None,  # (n, H), in the accumulator's dtype
    extras: tuple[str, ...] = (),
) -> tuple[Finished, Tensor]:
    """The statistics of rows start..stop and their labels' z; fills `kept`, and `dh` with each log-prob's gradient."""
    stop = len(rows) if stop is None else stop
    labels = rows.labels[start:stop]
    statistics = Statistics.begin(stop - start, head.weight, head.wide, extras)
    scratch = Scratch(head, plan, stop - start)
    for low, high, h in HiddenRows(hidden, rows, head, plan, start, stop).blocks():
        running = statistics.span(low, high)
        sums = None if dh is None else dh[low:high].zero_()
        rescale = None if dh is None else torch.empty_like(running.maximum)
        for place, first, last in head.slices(plan):
            w = scratch.weight(first, last)
            x = scratch.logits(h, w)
            out = None
            if sums is not None:
                out = scratch.tile(high - low, last - first)
            elif kept is not None and place < len(kept.tiles):
                out = kept.tiles[place, low:high, : last - first]
            fold(
                x,
                labels[low:high],
                head.bias_slice(first, last),
                running.maximum,
                running.total,
                running.target,
                start=first,
                transform=head.transform,
                out=out,
                rescale=rescale,
                keep_scale=1.0 if out is None else head.keep_scale(out),
                **running.sums,
            )
            if sums is not None and out is not None and rescale is not None:
                multiply(out, w, sums.mul_(rescale.unsqueeze(1)), add=True)
            elif out is not None and kept is not None:
                kept.maxima[place, low:high] = running.maximum
    vocab, whole = head.weight.shape[0], statistics
    if head.shards is not None:
        vocab, whole = head.shards.vocab, statistics.over(head.shards.among, head.shards.owner(labels + head.offset))
    done = whole.finish(vocab, extras)
    if dh is not None:
        keep_scale, size = head.keep_scale(scratch.tile(0, 0)), min(plan.row_block, GATHERED)
        _finish_dh(dh, statistics.maximum, done, whole.target, labels, head, keep_scale, size)
        if head.shards is not None:
            sum_over(dh, head.shards.among)
    return done, whole.target


def _finish_dh(
    sums: Tensor,  # (n, H), overwritten
    maximum: Tensor,  # (n,), of the columns that were summed
    done: Finished,
    target: Tensor,  # (n,)
    labels: Tensor,  # (n,)
    head: Head,
    keep_scale: float,
    size: int,  # rows at a time
) -> None:
    """slope·((1 − p_y)·W[y] − Σ p_j·W[j]); `sums` holds keep_scale times the sum over the others, by `maximum`."""
    others = -head.slope * torch.exp(maximum - done.maximum) / (done.norm * keep_scale)
    own = head.slope * done.rest * own_slope(target, head.transform)
    if head.shards is not None:  # the label's row of the head is with one rank
        own = torch.where((labels >= 0) & (labels < head.weight.shape[0]), own, 0.0)
    index = labels.clamp(0, head.weight.shape[0] - 1)
    for low in range(0, len(labels), size):
        part = slice(low, low + size)
        sums[part].mul_(others[part].unsqueeze(1))
        if len(head.weight):
            sums[part].addcmul_(head.weight[index[part]].to(sums.dtype), own[part].unsqueeze(1))


def gradient_sweep(
    hidden: Tensor,  # (B, T, H)
    rows: Rows,
    head: Head,
    plan: Plan,
    done: Finished,  # of the rows of the span
    target: Tensor,  # (n,), z of the labels
    upstream: Upstream,  # each (n,)
    *,
    start: int = 0,
    stop: int | None = None,
    kept: Kept | None = None,
    dh: Tensor | None = None,  # (n, H) zeros in the accumulator's dtype
    dw: Tensor | None = None,  # (V, H)
    db: Tensor | None = None,  # (V,)
    add: bool = False,
) -> None:
    """Adds upstream·dz @ W to `dh`; writes, or with `add` adds, (upstream·dz)ᵀ @ hidden to `dw` and its sum to `db`.

    `kept` holds no logits, which a gradient of entropies needs: there it must be None.
    """
    stop = len(rows) if stop is None else stop
    if start == stop:  # no product will write them
        for result in (dw, db):
            if result is not None and not add:
                result.zero_()
        return
    labels = rows.labels[start:stop]
    rowscale, tilt, own, unit = row_scales(upstream, done, target, head)
    source = HiddenRows(hidden, rows, head, plan, start, stop)
    # Not in 16 bits, even where one product makes a whole slice: cuBLAS may round its partial sums then.
    direct = dw is None or dw.dtype == head.wide
    # What was there before must not be scaled back with what comes now.
    direct = direct and (dw is None or not add or unit is None)
    scratch = Scratch(head, plan, stop - start, dw=not direct)

    for place, first, last in head.slices(plan):
        have = kept is not None and place < len(kept.tiles)
        # A kept tile needs the weight for dh alone.
        w = scratch.weight(first, last) if dh is not None or not have else head.weight[first:last]
        if dw is not None:
            dw_sums = scratch.dw(dw[first:last])
            fresh = not (add and direct)
        db_sums = None if db is None else torch.zeros(last - first, dtype=head.wide, device=db.device)
        for low, high, h in source.blocks():
            block = slice(low, high)
            dz = scratch.tile(high - low, last - first)
            if have and kept is not None:
                tile = kept.tiles[place, block, : last - first]
                factor = torch.exp(kept.maxima[place, block] - done.maximum[block]) / head.keep_scale(tile)
                factor *= rowscale[block]
                gradient_from_kept(tile, labels[block], factor, own[block], dz, start=first)
            else:
                gradient_from_logits(
                    scratch.logits(h, w),
                    labels[block],
                    head.bias_slice(first, last),
                    done.maximum[block],
                    rowscale[block],
                    own[block],
                    dz,
                    start=first,
                    transform=head.transform,
                    tilt=None if tilt is None else tilt[block],
                )
            if dh is not None:
                multiply(dz, w, dh[block], add=True)
            if dw is not None:
                multiply(dz.t(), h, dw_sums, add=not fresh)
                fresh = False
            if db_sums is not None:
                db_sums += dz.sum(0, dtype=head.wide)
        if dw is not None and unit is not None:
            dw_sums.mul_(unit)
        if dw is not None and not direct:
            dw[first:last] = dw[first:last] + dw_sums if add else dw_sums
        if db is not None and db_sums is not None:
            db_sums = db_sums if unit is None else db_sums * unit
            db[first:last] = db[first:last] + db_sums if add else db_sums
    if dh is not None and unit is not None:
        dh.mul_(unit)
