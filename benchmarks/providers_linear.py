"""The ways to a DPO loss and its gradients from hidden states and the head's weight, ours beside those of others.

Each rival is called as its documentation says, with the settings that are fastest for it here. One that is not
installed is skipped: `missing` says what to install.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from cases import DTYPES, LinearCase, make_linear
from providers import BETA, plain
from torch import Tensor
from torch.nn import functional

import fastpref
from fastpref.losses import dpo_loss

# hidden (B, T, H), weight (V, H), labels (B, T), ref_logps (B,), the case -> the loss, a scalar
LinearProvider = Callable[[Tensor, Tensor, Tensor, Tensor, LinearCase], Tensor]


def _dpo(logps: Tensor, ref_logps: Tensor) -> Tensor:  # (B,) both, [chosen; rejected]
    return dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), beta=BETA).loss


def _fused(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    return fastpref.linear_preference_loss(
        hidden, weight, labels, ref_logps, loss="sigmoid", beta=BETA, memory_budget=case.budget
    ).loss


def _fused_logps(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    logps = fastpref.linear_sequence_logps(hidden, weight, labels, memory_budget=case.budget)
    return _dpo(cast(Tensor, logps), ref_logps)


def _logits(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    """fastpref's other path, at its best: the logits of all positions exist, and turn into their gradient in place."""
    logits = functional.linear(hidden, weight)
    return _dpo(cast(Tensor, fastpref.sequence_logps(logits, labels, inplace_backward=True)), ref_logps)


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    return _dpo(plain(functional.linear(hidden, weight), labels), ref_logps)


def _plain_fp32(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    """Widened before the product: a CPU without bfloat16 instructions is slow at bfloat16 products."""
    return _dpo(plain(functional.linear(hidden.float(), weight.float()), labels), ref_logps)


def _trl_selective(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    from trl.trainer.utils import selective_log_softmax  # type: ignore[import-not-found]

    targets = labels[:, 1:]
    scored = targets != -100
    tokens = selective_log_softmax(functional.linear(hidden, weight)[:, :-1], targets.where(scored, 0), row_mask=scored)
    return _dpo(tokens.float().sum(-1), ref_logps)


# The entries of the vocabulary that TRL's trainers take at a time.
TRL_CHUNK = 32768


def _trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    """As TRL's `add_fused_lm_head` calls it on a GPU: with scored rows only. On a CPU TRL gives it all rows."""
    from trl.kernels import ChunkedLogProbFunction  # type: ignore[import-not-found]

    scored = labels[:, 1:] != -100
    rows, targets = hidden[:, :-1][scored], labels[:, 1:][scored]
    tokens = ChunkedLogProbFunction.apply(rows, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0]
    return _dpo(_sums(tokens, scored), ref_logps)


def _sums(tokens: Tensor, scored: Tensor) -> Tensor:  # (N,) and (B, T) -> (B,)
    return tokens.new_zeros(scored.shape).masked_scatter(scored, tokens).float().sum(-1)


@cache
def _liger_loss(compiled: bool) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # type: ignore[import-not-found]

    # It takes a reference model's head and hidden states, never its log-probs. Without one the reference is 0, and
    # that is the same loss here, because the two references of a pair are equal (linear_truth.py).
    return LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled, use_ref_model=False)


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    loss, *_ = _liger_loss(case.compiled)(weight, hidden[:, :-1], labels[:, 1:])
    return cast(Tensor, loss[0] if isinstance(loss, tuple) else loss)


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase
) -> Tensor:
    """Chunked, with the options that torch picks."""
    return _with_cross_entropy(hidden, weight, labels, ref_logps, torch.nn.LinearCrossEntropyOptions())


# Rows of a chunk. Of the headline's 510 rows torch makes 255 chunks.
TUNED_ROWS = 256


def _linear_cross_entropy_tuned(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase
) -> Tensor:
    """Chunked, with larger chunks, and on a CPU with products in float32, as its documentation advises there."""
    wide = torch.float32 if hidden.dtype.itemsize == 2 else None
    options = torch.nn.LinearCrossEntropyOptions(
        acc_policy="compact" if hidden.is_cuda else "accurate",
        chunking_method=None,
        batch_chunk_size=TUNED_ROWS,
        acc_dtype=wide,
    )
    return _with_cross_entropy(hidden, weight, labels, ref_logps, options)


def _with_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, options: Any) -> Tensor:
    scored = labels[:, 1:] != -100
    rows, targets = hidden[:, :-1][scored], labels[:, 1:][scored]
    losses = functional.linear_cross_entropy(rows, weight, targets, reduction="none", options=options)
    return _dpo(-_sums(losses, scored), ref_logps)


_PROVIDERS: dict[str, LinearProvider] = {
    "fastpref": _fused,
    "fastpref_logps": _fused_logps,
    "logits": _logits,
    "plain": _plain,
    "plain_fp32": _plain_fp32,
    "trl_selective": _trl_selective,
    "trl_chunked": _trl_chunked,
    "liger": _liger,
    "linear_cross_entropy_tuned": _linear_cross_entropy_tuned,
    "linear_cross_entropy": _linear_cross_entropy,
}

# What stands beside each other in a case, in the order of the run. "products" is no way to the loss, but its floor.
# On two cores torch's own options for linear_cross_entropy take 100 s a call, over ten times what the tuned ones take.
BESIDE: dict[str, tuple[str, ...]] = {
    "all": ("products", *_PROVIDERS),
    "most": ("products", *(name for name in _PROVIDERS if name != "linear_cross_entropy")),
    "fastest": ("products", "fastpref", "plain", "plain_fp32", "trl_selective", "linear_cross_entropy_tuned"),
    "plain": ("products", "fastpref", "fastpref_logps", "plain"),
    "none": ("fastpref",),
}
# Without gradients: what the reference's log-probs cost. In the cases that have "all" or "most" beside fastpref, which
# are also those where the memory of the slow ones is measured on a CPU: it is a call more, and much the same elsewhere.
FORWARD = ("products", "fastpref_logps", "plain")
THOROUGH = ("all", "most")
# Others' work, and the plain formula at its fastest; the fastest of them is the one to beat.
RIVALS = ("plain_fp32", "trl_selective", "trl_chunked", "liger", "linear_cross_entropy_tuned", "linear_cross_entropy")
# On a CPU these take up to 20 s and 5 GB: two rounds, and a first call only where it compiles.
SLOW = ("logits", "plain", *RIVALS)

# The module that a provider imports, and the package that holds it.
_IMPORTS = {"trl_selective": ("trl", "trl"), "trl_chunked": ("trl", "trl"), "liger": ("liger_kernel", "liger-kernel")}


def missing(provider: str) -> str | None:
    """Why a provider cannot run here, or None."""
    module, package = _IMPORTS.get(provider, ("fastpref", "fastpref"))
    if importlib.util.find_spec(module) is None:
        return f"{provider}: {package} is not installed"
    if provider.startswith("linear_cross_entropy") and not hasattr(functional, "linear_cross_entropy"):
        return f"{provider}: torch {torch.__version__} has no linear_cross_entropy"
    return None


def linear_call(
    provider: str, mode: str, case: LinearCase, hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and with mode "train" the gradients of the hidden states and, unless it is frozen, of the weight."""
    function = _PROVIDERS[provider]
    if mode == "forward":
        with torch.no_grad():
            return function(hidden.detach(), weight.detach(), labels, ref_logps, case), []
    loss = function(hidden, weight, labels, ref_logps, case)
    return loss.detach(), list(torch.autograd.grad(loss, [hidden] if case.frozen else [hidden, weight]))


def warm_up(provider: str, mode: str, case: LinearCase, device: str) -> None:
    """A call on a few rows, before one that counts: it imports what takes seconds and 150 MiB, and compiles nothing."""
    small = replace(case, length=5, hidden=32, vocab=64, pairs=1, share=1.0, compiled=False)
    ref_logps = torch.zeros(2, device=device)
    linear_call(provider, mode, small, *make_linear(small, device, 0), ref_logps)


def product_ways(case: LinearCase, device: str) -> list[tuple[torch.dtype, int]]:
    """Dtypes and widths of vocabulary slices in which the products alone are tried; the fastest of them counts."""
    dtype = DTYPES[case.dtype]
    if device != "cpu":
        return [(dtype, case.vocab), (dtype, 16384)]
    return [(dtype, 4096), (torch.float32, 4096)] if dtype != torch.float32 else [(dtype, 4096), (dtype, case.vocab)]


def product_count(case: LinearCase, mode: str) -> int:
    return 1 if mode == "forward" else 2 if case.frozen else 3


def products(case: LinearCase, mode: str, dtype: torch.dtype, width: int, rows: Tensor, weight: Tensor) -> None:
    """The matrix products of `rows` (N, H) and the head, with no element between them touched.

    The logits stand for their own gradient: the shapes are the same. Where `dtype` is wider than the weight's, slices
    are widened, and the slice of dW narrowed, as anyone must who multiplies in it.
    """
    count = product_count(case, mode)
    x = rows.to(dtype)
    dh = torch.zeros_like(x)
    dw = torch.empty_like(weight) if count == 3 else None
    for start in range(0, case.vocab, width):
        part = weight[start : start + width].to(dtype)
        z = x @ part.T
        if count > 1:
            dh.addmm_(z, part)
        if dw is not None and dtype == dw.dtype:
            torch.mm(z.T, x, out=dw[start : start + width])
        elif dw is not None:
            dw[start : start + width] = z.T @ x
