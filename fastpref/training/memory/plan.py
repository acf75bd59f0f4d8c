"""What a step will need in memory, before anything is allocated: by the model's shapes and a forward without numbers.

Parameters, gradients and AdamW's state are counted. What the backbone keeps for its backward is seen in a forward of
fake tensors (shapes and dtypes, no memory) over the largest micro-batch. The head's part is the linear path's plan.
What allocators waste, and what communication between processes needs, is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpref.checks import parse_budget
from fastpref.linear.peaks import Step, Use, logits_peak
from fastpref.linear.plan import machine_of, plan_tokens
from fastpref.memory import available
from fastpref.models import SOFTCAPS
from fastpref.training.adapters import output_head
from fastpref.training.data.collate import IGNORE, Batch
from fastpref.training.distributed.processes import is_sharded
from fastpref.training.memory.meta import on_meta
from fastpref.training.precision import autocasts
from fastpref.training.run import Run


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process at its largest micro-batch, by what they are for."""

    trained: int  # parameters, in elements,
    frozen: int
    parameters: int  # and all of them in bytes, buffers too
    gradients: int
    optimizer: int
    kept: int | None  # activations that backward needs; None where the forward does not run without numbers
    kept_checkpointed: int | None  # the same with gradient_checkpointing
    layer_backward: int  # while one layer's gradient is made
    head: int  # what log-probs take beyond hidden states and gradients
    head_gradient: int
    head_plan: str
    logits: int  # of all positions and not built; with logps=logits they are
    update: int  # scratch of the optimiser's step
    micro_batch: tuple[int, int, int]  # of the largest: pairs, positions, scored positions
    accumulates: bool
    checkpointing: bool
    why_unknown: str | None = None

    def total(self, *, checkpointing: bool) -> int | None:
        """The peak: in backward, where activations make way for gradients, or in the optimiser's step."""
        kept = self.kept_checkpointed if checkpointing else self.kept
        if kept is None:
            return None
        held = self.parameters + self.optimizer
        before = self.gradients if self.accumulates else 0  # of the micro-batches before
        backward = before + kept + max(self.head + self.head_gradient, self.layer_backward)
        return held + max(backward, self.gradients + self.update)


def plan_memory(run: Run) -> MemoryPlan:
    """The plan of a run whose model may be without numbers (on the meta device)."""
    config, device = run.config, run.accelerator.device
    indices, most = largest_micro_batch(run)
    batch = run.collate([run.pairs[index] for index in indices], run.part)
    positions, scored = batch.inputs["input_ids"].numel(), _scored(batch)
    parameters = list({id(p): p for p in run.model.parameters()}.values())
    trained = [p for p in parameters if p.requires_grad]
    buffers = sum(buffer.nbytes for buffer in run.model.buffers())
    bf16 = autocasts(config, device)
    shards = run.accelerator.num_processes if is_sharded(run.accelerator) else 1
    gradients = sum(p.nbytes for p in trained)

    weight: Tensor = run.model.get_output_embeddings().weight
    head, plan = _head(run, batch)
    cause, kept, last = None, None, 0
    try:
        kept, last = _kept_by_backbone(run.model, tuple(batch.inputs["input_ids"].shape), device, bf16=bf16)
    except Exception as error:  # whatever a model's own code makes of tensors without numbers
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    layers = max(1, getattr(run.model.config.get_text_config(), "num_hidden_layers", 1))
    one_layer = 0 if kept is None else kept // layers
    return MemoryPlan(
        trained=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in parameters) - sum(p.numel() for p in trained),
        parameters=sum(p.nbytes for p in parameters) // shards + buffers - _saved_by_bits(run),
        gradients=gradients // shards,
        optimizer=2 * gradients // shards,
        kept=kept,
        # A layer's input each, one layer computed again, and autocast's copies of trained weights until its end.
        kept_checkpointed=None if kept is None else layers * last + one_layer + (gradients // 2 if bf16 else 0),
        layer_backward=one_layer // 2,
        head=head,
        head_gradient=weight.nbytes if weight.requires_grad else 0,
        head_plan=plan,
        logits=positions * weight.shape[0] * _operand(run, weight).itemsize,
        update=0 if device.type == "cuda" else 2 * max(p.nbytes for p in trained),
        micro_batch=(len(batch.rows), positions, scored),
        accumulates=most > 1,
        checkpointing=config.gradient_checkpointing,
        why_unknown=cause,
    )


def _saved_by_bits(run: Run) -> int:
    """Bytes less than the model on the meta device shows, where bitsandbytes will quantise its linear layers.

    Of 4 bits: a scale of a byte for 64 weights, and one of 4 for 256 scales; of 8 bits: one of 4 for an output.
    """
    config, head = run.config, output_head(run.model)
    if not (config.load_in_4bit or config.load_in_8bit) or run.model.device.type != "meta":
        return 0
    saved = 0.0
    for module in run.model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, Conv1D)) or module is head or weight is None or weight.requires_grad:
            continue
        count = weight.numel()
        saved += weight.nbytes - (
            count / 2 + count / 64 * (1 + 4 / 256) if config.load_in_4bit else count + 4 * len(weight)
        )
    return int(saved)


def check_budget(run: Run) -> None:
    """ValueError where a memory_budget that was given does not hold one tile of the largest micro-batch."""
    if run.config.memory_budget is None or not run.pairs:
        return
    indices, _ = largest_micro_batch(run)
    _head(run, run.collate([run.pairs[index] for index in indices], run.part))


def largest_micro_batch(run: Run) -> tuple[list[int], int]:
    """The pairs of the first epoch's largest micro-batch on this process, and the most micro-batches of a step."""
    largest: list[int] = []
    most = 1
    for step in range(min(run.steps, run.plan.steps_per_epoch)):
        batches = run.plan.micro_batches(run.plan.step(step))
        most = max(most, len(batches))
        largest = max([largest, *batches], key=run.plan.sizes.of)
    return largest, most


def available_memory(device: torch.device, processes: int) -> tuple[int, str]:
    """Bytes that can still be had on the run's device, and whose they are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"{torch.cuda.get_device_name(device)}, free"
    return available() // processes, "main memory, left to this process"


def _operand(run: Run, weight: Tensor) -> torch.dtype:
    return torch.bfloat16 if autocasts(run.config, run.accelerator.device) else weight.dtype


def _head(run: Run, batch: Batch) -> tuple[int, str]:
    """What a batch's log-probs and their gradient take, and how they are made."""
    config, device = run.config, run.accelerator.device
    pairs = max(1, len(batch.rows) // (2 if run.spec.unpaired else 1))  # by two sequences
    positions, scored = batch.inputs["input_ids"].numel(), _scored(batch)
    weight: Tensor = run.model.get_output_embeddings().weight
    step = Step(
        pairs=pairs,
        length=max(2, positions // (2 * pairs)),
        share=min(1.0, scored / positions),
        hidden_size=weight.shape[1],
        vocab=weight.shape[0],
        dtype=_operand(run, weight),
        softcap=any(getattr(run.model.config.get_text_config(), name, None) for name in SOFTCAPS),
        gpu=device.type == "cuda",
        streams=False,
    )
    use: Use = "trainable" if weight.requires_grad else "frozen"
    if config.logps == "logits":
        return logits_peak(step, use), "logits of all positions, and their gradient"
    problem = replace(step.problem(use), rows=scored, weight_dtype=weight.dtype)
    plan = plan_tokens(problem, machine_of(device), parse_budget(config.memory_budget))
    gathered = 2 * scored * step.hidden_size * step.dtype.itemsize  # the scored rows, and their gradient
    return plan.peak + gathered, plan.describe


def _kept_by_backbone(model: Any, shape: tuple[int, ...], device: torch.device, *, bf16: bool) -> tuple[int, int]:
    """Bytes that the backbone's forward keeps for its backward, and those of what it gives to the head."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    twin = on_meta(model)
    if hasattr(twin, "get_base_model"):
        twin = twin.get_base_model()
    twin.set_attn_implementation("sdpa")  # a mask of segments computes no more than causal attention keeps
    backbone = getattr(twin, twin.base_model_prefix)
    for module in backbone.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    own: set[int] = set()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    with FakeTensorMode(), torch.device(device):
        known: dict[int, Tensor] = {}
        for module in backbone.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in known:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        known[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    table[name] = known[id(tensor)]
        own |= {tensor.untyped_storage()._cdata for tensor in known.values()}
        ids = torch.zeros(shape, dtype=torch.long)
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
        with torch.enable_grad(), autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = backbone(input_ids=ids, use_cache=False)[0]
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return total, hidden.nbytes


def _scored(batch: Batch) -> int:
    if batch.labels is not None:
        return int((batch.labels[:, 1:] != IGNORE).sum())
    return len(batch.scored.labels) if batch.scored is not None else 0
