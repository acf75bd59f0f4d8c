"""The reference's log-probs: the initial model's, computed once and kept in the run folder under a key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastpref.training.data import Pair, data_digest
from fastpref.training.forward import batch_logps
from fastpref.training.prepare import ResumeError, Run

FILE = "reference.safetensors"


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of every weight and buffer of the model, by name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def reference_key(weights: str, pairs: Sequence[Pair], *, reduction: str, precision: str, logps: str) -> str:
    how = f"reduction={reduction} precision={precision} logps={logps}"
    return f"2 weights={weights} data={data_digest(pairs)} {how}"


def load_reference(folder: Path, key: str) -> Tensor | None:
    """The stored log-probs (N, 2) on the CPU, or None where there are none under this key."""
    path = folder / FILE
    if not path.exists():
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        if (stored.metadata() or {}).get("key") != key:
            return None
        return stored.get_tensor("logps")


def save_reference(folder: Path, key: str, logps: Tensor) -> None:
    from safetensors.torch import save_file

    temporary = folder / f".{FILE}.tmp"
    save_file({"logps": logps}, str(temporary), metadata={"key": key})
    temporary.replace(folder / FILE)


def add_reference(run: Run) -> str | None:
    """Give every pair its reference log-probs, if the loss needs them; the digest of the weights they are of.

    They come from the dataset's columns, or from the run folder where its key fits, or from a pass over the
    data with the model as it is, which must be the initial one. A run that resumes uses what it stored. If
    that is gone, it computes again when the model given is still the one that it started from, and raises
    ResumeError when it is not.
    """
    if not run.spec.needs_reference:
        return None
    used = [run.pairs[index] for index in run.plan.used(run.steps)]  # a short run need not wait for all the data
    missing = [pair for pair in (*used, *run.eval_pairs) if pair.ref_chosen_logp is None]
    if len(missing) < len(used) + len(run.eval_pairs):
        run.console.say(
            f"reference log-probs are taken from the dataset's columns; they must be the "
            f"{run.spec.reduction} over a response's tokens, as loss {run.spec.name!r} means it"
        )
    if not missing:
        return None
    weights = weights_digest(run.model)
    initial = run.state["initial_weights"] if run.state is not None else weights
    config = run.config
    key = reference_key(initial, missing, reduction=run.spec.reduction, precision=config.precision, logps=config.logps)
    logps = load_reference(run.output_dir, key)
    if logps is None and run.checkpoint is not None:
        logps = load_reference(run.checkpoint.parent, key)
    if logps is None:
        if weights != initial:
            raise ResumeError(
                f"the reference log-probs of this run are not in {run.output_dir} any more, and the model "
                "given is not the one it started from: give the initial model, to compute them again"
            )
        logps = compute_reference(run, missing)
    if run.accelerator.is_main_process:
        save_reference(run.output_dir, key, logps)
    # By identity: two rows of the data may be the same.
    known = {id(pair): values for pair, values in zip(missing, logps.tolist(), strict=True)}
    run.pairs = [_with_reference(pair, known) for pair in run.pairs]
    run.eval_pairs = [_with_reference(pair, known) for pair in run.eval_pairs]
    return initial


def compute_reference(run: Run, pairs: Sequence[Pair]) -> Tensor:  # (N, 2) float32 on the CPU: chosen, rejected
    """Log-probs of the pairs under the model as it is, without gradient; the processes share the work."""
    config, accelerator, device = run.config, run.accelerator, run.accelerator.device
    logps = torch.zeros(len(pairs), 2, device=device)
    # Longest first: little padding, and a batch that does not fit fails at once.
    order = sorted(range(len(pairs)), key=lambda index: -pairs[index].length)
    share = order[accelerator.process_index :: accelerator.num_processes]
    run.model.eval()
    with torch.no_grad(), run.console.bar("reference log-probs", len(share)) as bar:
        for begin in range(0, len(share), config.batch_size):
            indices = share[begin : begin + config.batch_size]
            chunk = [pairs[index] for index in indices]
            batch = run.collate(chunk)
            chosen, rejected = batch_logps(run.model, batch, config, reduction=run.spec.reduction)
            logps[torch.tensor(indices, device=device)] = torch.stack([chosen, rejected], dim=1)
            bar.advance(len(indices))
    # Every pair is zero on all processes but the one that computed it.
    return accelerator.reduce(logps, "sum").cpu()


def _with_reference(pair: Pair, known: dict[int, list[float]]) -> Pair:
    if id(pair) not in known:
        return pair
    chosen, rejected = known[id(pair)]
    return replace(pair, ref_chosen_logp=chosen, ref_rejected_logp=rejected)
