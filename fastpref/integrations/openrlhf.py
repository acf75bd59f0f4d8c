"""OpenRLHF's log-probs and DPO loss, under its names.

    from fastpref.integrations.openrlhf import log_probs_from_logits  # in openrlhf/models/actor.py
    from fastpref.integrations.openrlhf import DPOLoss, _get_batch_logps  # in openrlhf/trainer/dpo_trainer.py
    DPOTrainer._get_batch_logps = staticmethod(_get_batch_logps)  # there it is a method

The originals: `openrlhf/models/utils.py`, `openrlhf/models/loss.py` and `openrlhf/trainer/dpo_trainer.py` of
https://github.com/OpenRLHF/OpenRLHF, v0.11.0 (3c3be62). Up to v0.6 `_get_batch_logps` took logits, and packed samples
had a function of their own; since then the model gives log-probs of tokens, unpacked already. Signatures and values are
the originals', except that results are float32 (theirs have the dtype of the logits: upcasting them first, as
`Actor.forward` does, is not needed here), that the mean of a sequence with nothing to score is 0 where theirs is
0/0 = NaN, and that arguments are checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastpref.checks import check_tensor, describe
from fastpref.integrations.aligned import aligned_logps
from fastpref.integrations.dpo import preference_loss


def log_probs_from_logits(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...), beside their logits: nothing is shifted here
    temperature: float = 1.0,
) -> Tensor:  # (...) float32
    """The log-prob of each label under `logits / temperature`; 0 for the label −100.

    The logits keep their values: the original divides them by the temperature in place.
    """
    return aligned_logps(logits, labels, temperature=temperature)


def _get_batch_logps(
    per_token_logps: Tensor,  # (B, T − 1), of the labels 1 ... T − 1
    attention_mask: Tensor,  # (B, T), padded on the right
    prompt_id_lens: Sequence[int] | Tensor,  # B numbers
    average_log_prob: bool = False,
) -> tuple[Tensor, Tensor]:  # (B,) sums and (B,) means, float32
    """Sums and means over each response: what the mask admits and what is not among the first tokens, the prompt.

    `average_log_prob`, an argument up to v0.10, can only be False, as there: both come back.
    """
    if average_log_prob is not False:
        raise ValueError(f"average_log_prob must be False, got {average_log_prob!r}: the means are the second result")
    check_tensor("per_token_logps", per_token_logps, floating=True)
    check_tensor("attention_mask", attention_mask)
    batch, length = attention_mask.shape if attention_mask.dim() == 2 else (-1, -1)
    if per_token_logps.shape != (batch, length - 1):
        raise ValueError(
            "attention_mask must be (B, T) and per_token_logps (B, T - 1), without the first token, got "
            f"{describe(attention_mask)} and {describe(per_token_logps)}"
        )
    prompts = torch.as_tensor(prompt_id_lens, device=attention_mask.device)
    if prompts.shape != (batch,) or prompts.is_floating_point():
        raise ValueError(
            f"prompt_id_lens must be {batch} integers, the prompt's length for each row of attention_mask, "
            f"got {describe(prompt_id_lens)}"
        )
    places = torch.arange(1, length, device=attention_mask.device)
    scored = (attention_mask[:, 1:] != 0) & (places >= prompts[:, None])  # (B, T − 1)
    sums = torch.where(scored, per_token_logps.float(), 0.0).sum(-1)
    return sums, sums / scored.sum(-1).clamp(min=1)


class DPOLoss(nn.Module):
    """DPO, cDPO with `label_smoothing`, or IPO: the mean loss of the pairs, and their rewards.

    `label_smoothing` under `ipo` is an error (the original does not look at it).
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,  # (B,)
        policy_rejected_logps: Tensor,  # (B,)
        reference_chosen_logps: Tensor,  # (B,)
        reference_rejected_logps: Tensor,  # (B,)
    ) -> tuple[Tensor, Tensor, Tensor]:  # (), (B,), (B,)
        losses, chosen_rewards, rejected_rewards = preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            self.beta,
            self.label_smoothing,
            self.ipo,
        )
        return losses.mean(), chosen_rewards, rejected_rewards
