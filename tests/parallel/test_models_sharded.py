"""`model_logps` of a model that somebody else's trainer sharded: FSDP2 and DeepSpeed ZeRO-3, each on two processes.

The head is a unit of its own, resharded after its forward: its weight is there while the head runs, gone when
`model_logps` returns, and gathered again for its gradient. Each process has other sequences, as in training.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')

from transformers import LlamaConfig, LlamaForCausalLM

from fastpref.models import model_logps

V = 101  # two processes do not divide it


def build(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=tied))
    with torch.no_grad():  # so that logits differ
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def batch_of(rank: int) -> dict[str, Tensor]:
    ids = torch.randint(0, V, (4, 9), generator=torch.Generator().manual_seed(rank))
    labels = ids.masked_fill(torch.arange(9) < 3 + rank, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(logps: Tensor) -> Tensor:
    return (logps / 50).square().sum()


def alone(*, tied: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Each rank's log-probs and the mean of their gradients, in one process with the whole model."""
    model = build(tied=tied)
    logps = [model_logps(model, batch_of(rank)) for rank in range(2)]
    (sum(map(loss_of, logps)) / 2).backward()
    return [x.detach() for x in logps], {name: p.grad for name, p in model.named_parameters()}


def fsdp2(model: Any) -> Iterator[dict[str, Tensor]]:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    if not model.config.tie_word_embeddings:
        fully_shard(model.lm_head)
    fully_shard(model, reshard_after_forward=True)
    for _ in range(2):
        logps = model_logps(model, batch_of(dist.get_rank()))
        shard = model.lm_head.weight.to_local()
        loss_of(logps).backward()
        yield {"logps": logps, "shard": shard, **{n: p.grad.full_tensor() for n, p in model.named_parameters()}}
        model.zero_grad()


def zero3(model: Any) -> Iterator[dict[str, Tensor]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    # Nothing stays gathered for being small, or because it is needed again soon.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    for _ in range(2):
        logps = model_logps(engine, batch_of(dist.get_rank()))
        shard = model.lm_head.weight.detach().clone()
        engine.backward(loss_of(logps))
        found = {name: safe_get_full_grad(p).view(p.ds_shape) for name, p in model.named_parameters()}
        yield {"logps": logps, "shard": shard, **found}
        engine.step()


def work(folder: Path, sharding: str) -> None:
    if sharding == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    steps = {"fsdp2": fsdp2, "zero3": zero3}[sharding]
    found = [[{k: v.detach().clone() for k, v in one.items()} for one in steps(build(tied=t))] for t in (False, True)]
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def check(ranks: list[Any]) -> None:
    for place, tied in enumerate((False, True)):
        logps, gradients = alone(tied=tied)
        for rank, found in enumerate(ranks):
            assert len(found[place]) == 2
            for step in found[place]:
                torch.testing.assert_close(step.pop("logps"), logps[rank], rtol=1e-6, atol=0)
                step.pop("shard")
                assert set(step) == set(gradients)
                for name, gradient in gradients.items():
                    torch.testing.assert_close(step[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_under_fsdp2_that_reshards_its_head_values_and_gradients_are_those_of_the_whole_model(
    launch: Callable[..., list[Any]], tmp_path: Path
) -> None:
    ranks = launch(__file__, 2, tmp_path, "fsdp2")
    held = [ranks[rank][0][0]["shard"].shape[0] for rank in range(2)]
    assert held == [51, 50]  # after the forward each process has its part of the head again
    check(ranks)


@pytest.mark.slow
def test_under_zero3_that_releases_its_head_values_and_gradients_are_those_of_the_whole_model(
    launch: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    ranks = launch(__file__, 2, tmp_path, "zero3")
    assert all(found[0][0]["shard"].numel() == 0 for found in ranks)
    check(ranks)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
