"""verl's linear_cross_entropy with the vocabulary split over two processes, against one process with all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.integrations.verl import linear_cross_entropy

SIZES = (13, 4)  # of the ranks' parts: the original has them equal


def inputs() -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator)
    weight = torch.randn(sum(SIZES), 8, generator=generator)
    labels = torch.randint(sum(SIZES), (2, 5), generator=generator)
    labels[0, :2] = torch.tensor([0, 16])  # a label in each part
    upstream = torch.randn(10, generator=generator), torch.randn(10, generator=generator)
    return hidden, weight, labels, upstream


def refusal(*arguments: Any) -> str:
    try:
        linear_cross_entropy(*arguments)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def work(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, weight, labels, upstream = inputs()
    hidden.requires_grad_()
    part = weight.split(SIZES)[rank].clone().requires_grad_()
    logps, entropy = linear_cross_entropy(hidden, part, labels, 0.7, "none", group)
    share, d_weight = torch.autograd.grad((logps, entropy), (hidden, part), upstream)
    total, _ = linear_cross_entropy(hidden, part, labels, 0.7, "sum", group)
    found = {"logps": logps, "entropy": entropy, "share": share, "d_weight": d_weight, "total": total}
    saved: dict[str, Any] = {name: value.detach() for name, value in found.items()}
    saved["other reduction"] = refusal(hidden, part, labels, 1.0, ("sum", "none")[rank], group)
    saved["transposed labels"] = refusal(hidden, part, labels.T if rank == 0 else labels, 1.0, "none", group)
    torch.save(saved, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(launch, tmp_path_factory) -> list[dict[str, Any]]:
    return launch(__file__, 2, tmp_path_factory.mktemp("verl"))


def truth() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, labels, upstream = inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    p = (hidden.flatten(0, 1) @ weight.T / 0.7).softmax(-1)
    logps, entropy = p.gather(1, labels.view(-1, 1))[:, 0].log(), torch.special.entr(p).sum(-1)
    return logps, entropy, *torch.autograd.grad((logps, entropy), (hidden, weight), [x.double() for x in upstream])


def test_values_are_those_of_the_whole_vocabulary_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    logps, entropy, *_ = truth()
    for rank in ranks:
        torch.testing.assert_close(rank["logps"].double(), logps, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(rank["entropy"].double(), entropy, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(rank["total"].double(), logps.sum(), rtol=2e-6, atol=2e-6)
    assert torch.equal(ranks[0]["logps"], ranks[1]["logps"])


def test_the_ranks_shares_of_hidden_s_gradient_sum_to_it_as_the_original_leaves_it(ranks: list[dict[str, Any]]) -> None:
    *_, d_hidden, d_weight = truth()
    summed = ranks[0]["share"] + ranks[1]["share"]  # the caller's all-reduce
    torch.testing.assert_close(summed.double(), d_hidden, rtol=1e-5, atol=2e-6)
    local = torch.cat([rank["d_weight"] for rank in ranks])
    torch.testing.assert_close(local.double(), d_weight, rtol=1e-5, atol=2e-6)


def test_what_differs_or_is_wrong_on_one_rank_raises_on_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "reduction must be equal on all ranks of dist_process_group" in rank["other reduction"]
    assert "labels its shape without H" in ranks[0]["transposed labels"]
    assert "rank 0 of dist_process_group refused its arguments" in ranks[1]["transposed labels"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
