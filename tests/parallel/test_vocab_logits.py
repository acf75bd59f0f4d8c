"""Logits whose vocabulary is split over 2 and 4 gloo processes: the values, extras and gradients of one process.

One launch of each size; every case runs in it, and the tests look at what the ranks saved.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastpref
from fastpref.extras import EXTRAS

B, T, V = 2, 7, 23
SIZES = {2: {"uneven": [14, 9], "empty": [23, 0]}, 4: {"uneven": [6, 5, 5, 7], "empty": [9, 0, 11, 3]}}
CASES: dict[str, dict[str, Any]] = {
    "logps": {},
    "inplace": {"inplace_backward": True},
    "aligned, softcap": {"shift": False, "softcap": 2.0, "temperature": 0.8},
    "ignore_index 3": {"ignore_index": 3},
    "extras": {"extras": EXTRAS},
    "entropy_grad": {"extras": EXTRAS, "entropy_grad": True},
    "entropy_grad, inplace": {"extras": ["entropy"], "entropy_grad": True, "inplace_backward": True},
}


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels in every part, and a mask; entries of −inf as a padded vocabulary has them, NaN where unscored."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, T, V, generator=generator)
    labels = torch.arange(B * T).view(B, T) * 5 % V
    logits[0, 2, 14:], labels[0, 2:4] = -torch.inf, 4
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4] = False
    labels[1, 2] = -100
    logits[1, 1] = torch.nan  # predicts the label that is ignored; scored where labels are aligned, see `call`
    return logits.to(dtype), labels, mask


def call(part: slice, dtype: torch.dtype, group: Any, **options: Any) -> dict[str, Tensor]:
    logits, labels, mask = data(dtype)
    labels[labels == -100] = options.get("ignore_index", -100)
    if not options.get("shift", True):
        logits[1, 1] = 0.5
    own = logits[..., part].clone().requires_grad_()
    found = fastpref.token_logps(own * 1, labels, mask=mask, vocab_group=group, **options)
    logps, extras = found if isinstance(found, tuple) else (found, None)
    weight = torch.linspace(-1, 2, B * T).view(B, T)
    loss = (weight * logps).sum()
    if options.get("entropy_grad"):
        loss = loss + (weight.flip(0) * extras.entropy).sum()
    loss.backward()
    named = {name: value for name, value in (extras._asdict() if extras else {}).items() if value is not None}
    return {"logps": logps.detach(), "grad": own.grad, **{name: value.detach() for name, value in named.items()}}


def part_of(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def raises(function: Callable[[], Any]) -> str:
    try:
        return f"no error: {function()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refusals(rank: int, size: int, group: Any) -> dict[str, str]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    logits, labels, _ = data()
    logits[1, 1] = 0.0
    own = logits[..., part_of(SIZES[size]["uneven"], rank)].contiguous()
    last = rank == size - 1
    changed = labels.clone()
    changed[0, 1] += last
    outside = labels.clone()
    outside[1, 3] = V

    def run(x: Any = own, y: Any = labels, function: Any = fastpref.token_logps, **options: Any) -> Callable[[], Any]:
        return lambda: function(x, y, vocab_group=group, **options)

    one, two = dist.new_group([0]), dist.new_group([1])
    cases = {
        "labels": run(y=changed),
        "outside": run(y=outside),
        "lengths": run(own[:, : T - last], labels[:, : T - last]),
        "dtypes": run(own.double() if last else own),
        "shape on one": run(own[0] if last else own),
        "no tensor on one": run(None if last else own),
        "bad option on one": run(temperature=-1.0 if last else 1.0),
        "temperature": run(temperature=2.0 if last else 1.0),
        "extras": run(extras=["entropy"] if last else []),
        "offsets": run(
            own.flatten(0, 1),
            labels.flatten(),
            function=fastpref.sequence_logps,
            shift=False,
            cu_seqlens=torch.tensor([0, 4 + last, B * T]),
        ),
        "DTensor labels": run(y=DTensor.from_local(labels, DeviceMesh("cpu", range(size)))),
        "nothing": run(own[..., :0]),
        "functions": run(function=fastpref.sequence_logps if last else fastpref.token_logps),
        "on_empty": run(y=torch.full_like(labels, -100), function=fastpref.sequence_logps, on_empty="raise"),
        "foreign group": lambda: (
            fastpref.token_logps(own, labels, vocab_group=two if rank == 0 else one)
            if rank < 2
            else fastpref.token_logps(own, labels, vocab_group=one)
        ),
        "compile": lambda: torch.compile(run(), backend="eager", fullgraph=True)(),
    }
    return {name: raises(case) for name, case in cases.items()}


def with_dtensor(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    group = mesh.get_group()
    logits, labels, mask = data()
    sharded = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
    logps = fastpref.token_logps(sharded, labels, mask=mask, vocab_group=group)
    logps.sum().backward()
    assert isinstance(sharded.grad, DTensor)
    # How torch itself lays out the gradient of a part, which differs between its versions.
    own = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
    own.to_local().sum().backward()
    assert isinstance(own.grad, DTensor)
    wrong = distribute_tensor(logits, mesh, [Shard(1)])
    other = dist.new_group(list(range(size))[::-1][:1])
    return {
        "logps": logps.detach(),
        "grad": sharded.grad.full_tensor(),
        "placements": (str(sharded.grad.placements), str(own.grad.placements)),
        "no group": raises(lambda: fastpref.token_logps(sharded, labels)),
        "other dimension": raises(lambda: fastpref.token_logps(wrong, labels, vocab_group=group)),
        "other ranks": raises(lambda: fastpref.token_logps(sharded, labels, vocab_group=other))
        if rank == size - 1
        else "",
    }


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    found: dict[str, Any] = {}
    for kind, sizes in SIZES[size].items():
        for name, options in CASES.items():
            found[f"{kind}: {name}"] = call(part_of(sizes, rank), torch.float32, group, **options)
        found[f"{kind}: bfloat16"] = call(part_of(sizes, rank), torch.bfloat16, group, extras=EXTRAS)
    logits, labels, _ = data()
    logits[1, 1] = 0.0
    own = logits[..., part_of(SIZES[size]["uneven"], rank)]
    offsets = torch.tensor([0, 5, B * T])
    found["sequences"] = fastpref.sequence_logps(
        own.flatten(0, 1), labels.flatten(), cu_seqlens=offsets, reduction="mean", return_lengths=True,
        extras=["is_top1"], vocab_group=group,
    )  # fmt: skip
    found["refusals"] = refusals(rank, size, group)
    found["dtensor"] = with_dtensor(rank, size)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, launch: Callable[..., Any], tmp_path_factory: Any) -> list[dict[str, Any]]:
    return launch(__file__, request.param, tmp_path_factory.mktemp(f"vocab-{request.param}"))


@pytest.mark.parametrize("name", [*CASES, "bfloat16"])
@pytest.mark.parametrize("kind", ["uneven", "empty"])
def test_parts_make_the_numbers_of_the_whole(ranks: list[dict[str, Any]], kind: str, name: str) -> None:
    """The same bits on all ranks; within 1e-6 of one process, and the parts' gradients are those of the whole."""
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    alone = call(slice(0, V), dtype, None, **CASES.get(name, {"extras": EXTRAS}))
    parts = [rank[f"{kind}: {name}"] for rank in ranks]
    for key, value in alone.items():
        if key == "grad":
            whole = torch.cat([part["grad"] for part in parts], -1)
            rounding = {"rtol": 1e-2, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(whole, value, **rounding)
        else:
            assert all(torch.equal(part[key], parts[0][key]) for part in parts)
            torch.testing.assert_close(parts[0][key], value, rtol=1e-6, atol=2e-6)


def test_packed_sequences_are_those_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    logits, labels, _ = data()
    logits[1, 1] = 0.0
    values, lengths, extras = fastpref.sequence_logps(
        logits.flatten(0, 1), labels.flatten(), cu_seqlens=torch.tensor([0, 5, B * T]), reduction="mean",
        return_lengths=True, extras=["is_top1"],
    )  # fmt: skip
    for rank in ranks:
        found = rank["sequences"]
        assert torch.equal(found[0], ranks[0]["sequences"][0])
        torch.testing.assert_close(found[0], values, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[1], lengths)
        assert torch.equal(found[2].is_top1, extras.is_top1)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("labels", "the scored labels (checksum) must be equal"),
        ("outside", f"labels[1, 3] is {V}, outside [0, V={V})"),
        ("lengths", "T must be equal on all ranks of vocab_group"),
        ("dtypes", "the dtype of the logits (checksum) must be equal"),
        ("temperature", "temperature, logit_scale and softcap (checksum) must be equal"),
        ("extras", "extras (bits) must be equal"),
        ("offsets", "cu_seqlens (checksum) must be equal"),
        ("DTensor labels", "labels must be no DTensor: pass labels.to_local()"),
        ("nothing", "vocabulary of at least one entry"),
        ("functions", "are in different calls"),
        ("on_empty", "have no scored token"),
    ],
)
def test_what_does_not_fit_together_raises_on_every_rank(ranks: list[dict[str, Any]], case: str, says: str) -> None:
    for rank in ranks:
        assert says in rank["refusals"][case]
        assert rank["refusals"][case].startswith("ValueError")


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("shape on one", "labels must have the shape"),
        ("no tensor on one", "TypeError: logits must be a torch.Tensor, got None"),
        ("bad option on one", "temperature must be a finite number"),
    ],
)
def test_what_one_rank_refuses_raises_on_all(ranks: list[dict[str, Any]], case: str, says: str) -> None:
    *others, last = [rank["refusals"][case] for rank in ranks]
    assert says in last
    assert all(f"rank {len(others)} of vocab_group refused its arguments" in message for message in others)


def test_a_group_without_this_rank_and_compiled_code_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "is not in vocab_group" in rank["refusals"]["foreign group"]
        assert "vocab_group" in rank["refusals"]["compile"]
        assert "does not go through torch.compile" in rank["refusals"]["compile"]


def test_a_dtensor_is_taken_as_its_parts_and_gets_its_gradient_as_one(ranks: list[dict[str, Any]]) -> None:
    logits, labels, mask = data()
    logits.requires_grad_()
    logps = fastpref.token_logps(logits, labels, mask=mask)
    logps.sum().backward()
    for rank in ranks:
        found = rank["dtensor"]
        torch.testing.assert_close(found["logps"], logps.detach(), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(found["grad"], logits.grad, rtol=1e-6, atol=1e-6)
        assert found["placements"][0] == found["placements"][1]
        assert "pass vocab_group=" in found["no group"]
        assert "full_tensor()" in found["no group"]
        assert "sharded on their last dimension alone" in found["other dimension"]
    assert "they must be the same" in ranks[-1]["dtensor"]["other ranks"]
