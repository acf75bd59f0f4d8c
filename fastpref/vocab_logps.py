"""Log-probs from logits whose vocabulary is split over a process group: rank r has (B, T, V_r), all have the labels.

Forward: each rank reads its part once, and one gather of a few numbers a position makes the whole rows' statistics, the
same bits on every rank. Backward: each rank writes its part's gradient; nothing is communicated.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.backend import validate_labels
from fastpref.checks import describe
from fastpref.extras import EXTRAS
from fastpref.inputs import LogitsBatch
from fastpref.ops import grad_of_logits, refuse_consumed, row_statistics
from fastpref.parallel.groups import agree, checksum, members
from fastpref.parallel.vocab import RowStatistics, VocabShards, combine
from fastpref.tiled import check_labels_in_range, scored_labels
from fastpref.token_values import TokenValues, sums_for, token_values, with_wrong_labels

# Labels as one part sees them: an entry of it, one of another part, or not scored.
ELSEWHERE, NOT_SCORED = -1, -100


def agree_on_vocabulary(
    call: str, vocab_group: Any, prepare: Callable[[], LogitsBatch], cu_seqlens: Tensor | None
) -> tuple[LogitsBatch, VocabShards]:
    """`prepare` checks this rank's arguments: either all ranks of the group go on or all of them raise."""
    among = members("vocab_group", vocab_group)
    batches: list[LogitsBatch] = []

    def facts() -> Mapping[str, int]:
        batch = prepare()
        batches.append(batch)
        scored = _scored_rows(batch)
        asked = [name in batch.extras for name in EXTRAS]
        return {
            "V": batch.logits.shape[2],
            "B": batch.logits.shape[0],
            "T": batch.logits.shape[1],
            "the dtype of the logits (checksum)": zlib.crc32(str(batch.logits.dtype).encode()),
            "the number of scored labels": int(scored.sum()),
            "the scored labels (checksum)": checksum(torch.where(scored, batch.row_labels(), NOT_SCORED)),
            "cu_seqlens (checksum)": checksum(cu_seqlens),
            "shift": batch.shift,
            "temperature, logit_scale and softcap (checksum)": zlib.crc32(repr(batch.options).encode()),
            "extras (bits)": sum(1 << place for place, wanted in enumerate(asked) if wanted),
            "entropy_grad": batch.entropy_grad,
        }

    told = agree("vocab_group", call, among, facts, differ=("V",))
    batch, shards = batches[0], VocabShards(among, tuple(one["V"] for one in told))
    # From here on every rank sees the same: each check fails on all of them or on none.
    if shards.vocab == 0:
        raise ValueError(
            f"logits must have a vocabulary of at least one entry, got V = {list(shards.sizes)} on the ranks"
        )
    if batch.logits.device.type == "cpu" or validate_labels():
        scored = scored_labels(batch.labels, batch.mask, batch.ignore_index, batch.shift)
        check_labels_in_range(batch.labels, scored, batch.shift, shards.vocab)
    return batch, shards


def sharded_token_values(batch: LogitsBatch, shards: VocabShards) -> TokenValues:
    """Log-probs and extras (B, T) where the labels stand, with the logits' gradient."""
    return TokenValues(*_ShardedTokenLogps.apply(batch.logits, batch, shards))


def local_logits(logits: Any, vocab_group: Any) -> Any:
    """This rank's part of logits that are a DTensor over the group; others as they are."""
    if not hasattr(logits, "full_tensor"):
        return logits
    mesh, placements, last = logits.device_mesh, logits.placements, logits.dim() - 1
    fits = len(placements) == 1 and placements[0].is_shard() and placements[0].dim % logits.dim() == last
    if not fits:
        raise ValueError(
            f"logits that are a DTensor must be sharded on their last dimension alone, got {placements} over a mesh of "
            f"shape {tuple(mesh.shape)}: redistribute(placements=[Shard(-1)]) over the mesh of vocab_group"
        )
    ranks, wanted = mesh.mesh.flatten().tolist(), dist.get_process_group_ranks(vocab_group)
    if ranks != wanted:
        raise ValueError(
            f"logits are a DTensor over ranks {ranks}, vocab_group has ranks {wanted}: they must be the same"
        )
    return logits.to_local()


def refuse_dtensor(logits: Any) -> None:
    if hasattr(logits, "full_tensor"):
        raise ValueError(
            f"logits are a DTensor ({describe(logits)}), of which each rank has a part: pass vocab_group=, the process "
            "group over which their vocabulary is split, or logits.full_tensor()"
        )


def _scored_rows(batch: LogitsBatch) -> Tensor:  # (B, T), where the rows stand
    scored = scored_labels(batch.labels, batch.mask, batch.ignore_index, batch.shift)
    rows = torch.zeros_like(batch.labels, dtype=torch.bool)
    rows[:, : scored.shape[1]] = scored
    return rows


def _each(rows: RowStatistics, change: Callable[[Tensor], Tensor]) -> RowStatistics:
    present: dict[str, Any] = {name: change(x) for name, x in rows._asdict().items() if x is not None}
    return RowStatistics(**present)


class _ShardedTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, batch: LogitsBatch, shards: VocabShards) -> tuple[Tensor, ...]:
        scored, labels = _scored_rows(batch), batch.row_labels().long()
        own = labels - shards.offset
        own = torch.where((own >= 0) & (own < shards.size), own, ELSEWHERE)
        own = torch.where(scored, own, NOT_SCORED)
        # Labels now stand with their rows, so that there is no shift.
        ctx.options, ctx.inplace = (0, NOT_SCORED, batch.options), batch.inplace_backward
        part = row_statistics(logits, own, None, 0, NOT_SCORED, batch.options, sums_for(batch.extras))
        owner = shards.owner(labels)
        whole = combine(_each(part, Tensor.flatten), owner.flatten(), shards.among)
        rows = _each(whole, lambda x: x.view(labels.shape))
        rows = with_wrong_labels(rows, scored & (owner < 0))
        values = token_values(rows, scored[:, : labels.shape[1] - batch.shift], batch.shift, shards.vocab)
        ctx.shift, ctx.entropy_grad, ctx.consumed = batch.shift, batch.entropy_grad, False
        ctx.save_for_backward(logits, own, rows.maximum, rows.total, values.entropy)
        constants = [values.mean_logits, values.is_top1, values.log_sum_sq_probs]
        ctx.mark_non_differentiable(*constants, *([] if batch.entropy_grad else [values.entropy]))
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor, *_: Tensor | None) -> tuple:
        refuse_consumed(ctx)
        logits, own, row_max, row_sum, entropy = ctx.saved_tensors

        def at_rows(x: Tensor) -> Tensor:  # what stands with the labels
            return x.roll(-ctx.shift, 1)

        entropies = (at_rows(entropy), at_rows(grad_entropy)) if ctx.entropy_grad else ()
        return grad_of_logits(ctx, at_rows(grad), (logits, own, None, row_max, row_sum), *entropies), None, None
