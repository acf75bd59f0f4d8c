"""float64 values of the linear path: the loss, and its gradients on a few rows of hidden states and of the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cases import LinearCase
from ..inputs import DISTINCT_ROWS, row_of
from ..measure import relative_error
from ..providers.base import BETA

HIDDEN_ROWS = 8
WEIGHT_ROWS = 64
SLICE = 8192  # entries of the vocabulary widened at a time


@dataclass(frozen=True)
class LinearTruth:
    """What the inputs give as they are stored, in float64. Sampled rows of dh and of dW, and where they lie.

    `ref_logps` belongs to the inputs: the mean of a pair's two values, for both. Only the difference between the two
    enters DPO, so that a provider which cannot be given the reference's log-probs computes the same loss without.
    """

    ref_logps: Tensor  # (B,) float32
    loss: float
    rows: Tensor  # (HIDDEN_ROWS,) of hidden as (B·T, H)
    hidden_gradient: Tensor  # (HIDDEN_ROWS, H)
    entries: Tensor  # (WEIGHT_ROWS,) of the vocabulary
    weight_gradient: Tensor  # (WEIGHT_ROWS, H)

    @classmethod
    def of(cls, case: LinearCase, hidden: Tensor, weight: Tensor, labels: Tensor) -> LinearTruth:
        hidden, weight = hidden.detach().flatten(0, 1), weight.detach()
        distinct = hidden[:DISTINCT_ROWS].double()
        logits = torch.cat([distinct @ part.double().T for part in weight.split(SLICE)], dim=1)
        lse = logits.logsumexp(-1)

        # Position t predicts label t + 1; the last of a sequence predicts nothing.
        targets = functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        scored = (targets != -100).nonzero().squeeze(-1)  # (N,)
        targets, kinds = targets[scored], row_of(case, hidden.device.type)[scored]
        sequence = scored // case.length
        logps = logits[kinds, targets] - lse[kinds]
        values = torch.zeros(case.batch, dtype=torch.float64, device=hidden.device).index_add_(0, sequence, logps)

        pairs = values.view(2, case.pairs)  # chosen, rejected
        reference = pairs.mean(0).float().repeat(2)
        margin = BETA * (pairs[0] - pairs[1])
        loss = float(functional.softplus(-margin).mean())
        chosen = -BETA * torch.sigmoid(-margin) / case.pairs
        upstream = torch.cat([chosen, -chosen])[sequence]  # (N,)

        few = torch.linspace(0, len(scored) - 1, HIDDEN_ROWS).long().to(scored.device)
        p = (logits[kinds[few]] - lse[kinds[few], None]).exp()
        expected = torch.zeros(HIDDEN_ROWS, case.hidden, dtype=torch.float64, device=hidden.device)
        for part, share in zip(weight.split(SLICE), p.split(SLICE, dim=1), strict=True):
            expected += share @ part.double()
        hidden_gradient = upstream[few, None] * (weight[targets[few]].double() - expected)

        spaced = torch.linspace(0, case.vocab - 1, WEIGHT_ROWS - HIDDEN_ROWS).long().to(scored.device)
        entries = torch.cat([spaced, targets[few]])
        p = (logits[:, entries] - lse[:, None]).exp()[kinds]  # (N, WEIGHT_ROWS)
        dz = upstream[:, None] * ((targets[:, None] == entries).double() - p)
        dz = torch.zeros(len(distinct), len(entries), dtype=dz.dtype, device=dz.device).index_add_(0, kinds, dz)
        return cls(reference, loss, scored[few], hidden_gradient, entries, dz.T @ distinct)

    def errors(self, loss: Tensor, gradients: list[Tensor]) -> dict[str, Any]:
        """Of the loss in nats; of the gradients relative to the norm of the sampled rows."""
        out: dict[str, Any] = {"value_error": abs(float(loss) - self.loss)}
        if gradients:
            rows = gradients[0].flatten(0, 1)[self.rows]
            out["gradient_errors"] = {"hidden": relative_error(rows, self.hidden_gradient)}
        if len(gradients) == 2:
            out["gradient_errors"]["weight"] = relative_error(gradients[1][self.entries], self.weight_gradient)
        return out
