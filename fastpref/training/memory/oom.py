"""Out of memory, or soon to be: the sizes, and what to change, cheapest first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from fastpref.checks import parse_budget
from fastpref.memory import available, resident
from fastpref.tables import size_text
from fastpref.training.adapters import is_adapted
from fastpref.training.data.tokens import Pair
from fastpref.training.run import Run

# What allocators other than CUDA's say, in a RuntimeError.
MESSAGES = ("DefaultCPUAllocator", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


Work = Literal["step", "forward", "update"]


class MemoryLimitError(RuntimeError):
    """Memory did not suffice; the message has the sizes and what to change."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that some memory was all taken: a GPU's, or the process's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


@contextmanager
def explained(run: Run, doing: str, pairs: Sequence[Pair] = (), *, work: Work = "forward") -> Iterator[None]:
    """An allocator's error in here becomes a MemoryLimitError.

    Args:
        doing: what is done here, as the message calls it: "step 7".
        pairs: those of the batch, where there is one.
        work: "step" for a forward and its backward, "forward" for one alone, "update" for the optimiser's part.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryLimitError) or not out_of_memory(error):
            raise
        sizes = (_batch(run, pairs), _model(run), _allocated(run, error))
        what = what_to_change(run, pairs=len(pairs), work=work)
        raise MemoryLimitError(f"out of memory in {doing}: {'; '.join(sizes)}. {what}") from error


def _batch(run: Run, pairs: Sequence[Pair]) -> str:
    if not pairs:
        return f"longest sequence of the data {max(pair.length for pair in run.pairs):,}"
    tokens, longest = run.layout.sizes(pairs).of(range(len(pairs))), max(pair.length for pair in pairs)
    count = "1 pair" if len(pairs) == 1 else f"{len(pairs)} pairs"
    return f"{count}, {tokens:,} tokens (layout {run.layout.name}), longest sequence {longest:,}"


def _model(run: Run) -> str:
    config: Any = run.model.config.get_text_config()
    hidden, vocab, layers = (getattr(config, name, "?") for name in ("hidden_size", "vocab_size", "num_hidden_layers"))
    weights = sum(p.nbytes for p in run.model.parameters())
    gradients = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    sizes = [
        f"weights {size_text(weights)}",
        f"gradients {size_text(gradients)}",
        f"optimiser {size_text(2 * gradients)}",
    ]
    if run.config.logps == "linear":
        sizes.append(f"log-probs up to {size_text(parse_budget(run.config.memory_budget))} (memory_budget)")
    return f"H = {hidden}, V = {vocab}, {layers} layers; {', '.join(sizes)}"


def _allocated(run: Run, error: BaseException) -> str:
    device = run.accelerator.device
    wanted = re.search(r"[Tt]ried to allocate ([\d.,]+ ?\w+)", str(error))
    asked = f"could not get {wanted[1]} more" if wanted else f"the allocator said: {' '.join(str(error).split())[:200]}"
    if device.type == "cuda" and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(device).total_memory
        return (
            f"{asked}, with {size_text(torch.cuda.memory_allocated(device))} allocated and "
            f"{size_text(torch.cuda.memory_reserved(device))} reserved of {size_text(total)}"
        )
    return f"{asked}, with {size_text(resident())} resident and {size_text(available())} left"


def what_to_change(run: Run, *, pairs: int, work: Work = "step") -> str:
    """The remedies in order of what they cost; only those that would help here and are not set yet.

    Args:
        pairs: in the batch, 0 where it is not known.
    """
    config, step, batch = run.config, work == "step", work != "update"
    cut = run.spec.separable and pairs != 1
    offload = run.accelerator.device.type != "cpu" and not config.offload_activations
    adapted = config.lora_rank > 0 or is_adapted(run.model)
    options = [
        (batch and config.logps != "linear", "logps=linear (the same numbers without logits)"),
        (step and cut and not config.auto_batch, "auto_batch (the same steps in smaller micro-batches)"),
        (work == "forward" and pairs != 1, f"a smaller batch_size (now {config.batch_size})"),
        (step and not config.gradient_checkpointing, "gradient_checkpointing (every layer computed twice)"),
        (batch and config.logps == "linear" and config.memory_budget is None, "a smaller memory_budget"),
        (step and offload, "offload_activations"),
        (not adapted, "lora_rank (the weights then need no gradients and no optimiser state)"),
        (batch, f"a smaller max_length (now {run.max_length:,})"),
    ]
    listed = [text for helps, text in options if helps] or ["a smaller model, or more processes that share it (FSDP)"]
    return f"What to change, the cheapest first: {'; '.join(listed)}"
