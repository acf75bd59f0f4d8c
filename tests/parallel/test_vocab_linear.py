"""A head that is split over 2 and 4 processes does what one process does with the whole of it.

One launch of each size, in which all cases run: this file is its own worker (conftest.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastpref
from fastpref.extras import EXTRAS
from fastpref.linear import api, plan, tokens
from fastpref.linear.shards import Call
from fastpref.linear.tokens import Request
from fastpref.parallel.groups import Members
from fastpref.parallel.vocab import VocabShards
from fastpref.tiled import Transform

V, H = 101, 12
# V_r of each case; no V_r is V divided by the ranks.
SIZES = {2: {"uneven": (40, 61), "empty": (101, 0)}, 4: {"uneven": (13, 40, 9, 39), "empty": (30, 0, 70, 1)}}
CAPPED = {"softcap": 5.0, "temperature": 1.3, "logit_scale": 2.0}
TOKENS: dict[str, dict[str, Any]] = {
    "keep": {"plan": "keep"},
    "mixed": {"memory_budget": 14000},
    "recompute, softcap": {"plan": "recompute", **CAPPED},
    "two-pass": {"plan": "two-pass"},
    "frozen head": {"trained": (True, False, False)},
    "frozen head, softcap": {"trained": (True, False, False), **CAPPED},
    "only the head": {"trained": (False, True, True)},
    "forward": {"trained": (False, False, False), "extras": EXTRAS, **CAPPED},
    "extras": {"extras": EXTRAS},
    "extras, frozen head": {"extras": EXTRAS, "trained": (True, False, False)},
    "entropy": {"extras": EXTRAS, "entropy_grad": True, **CAPPED},
    "entropy, two-pass": {"extras": ("entropy",), "entropy_grad": True, "plan": "two-pass"},
    "entropy, frozen head": {"extras": ("entropy",), "entropy_grad": True, "trained": (True, False, False)},
    "bfloat16": {"dtype": torch.bfloat16},
    "nothing scored": {"mask": torch.zeros(4, 9)},
}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "dpop": {"loss": "dpop", "lam": 5.0},
    "ipo, frozen head": {"loss": "ipo", "trained": (True, False, False)},
    "a callable, softcap": {"loss": lambda a, b, c, d: torch.nn.functional.softplus(b - a + c - d), **CAPPED},
}


def make(dtype: torch.dtype = torch.float32, vocab: int = V) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 9, H, generator=generator)
    weight, bias = torch.randn(vocab, H, generator=generator), torch.randn(vocab, generator=generator)
    labels = torch.randint(vocab, (4, 9), generator=generator)
    labels[0, 1:6] = torch.tensor([0, 15, 55, 99, 100]) % vocab  # on every part, and at both ends
    labels[2, 3:] = -100
    return [x.to(dtype) for x in (hidden, weight, bias)], labels


def small_tiles() -> None:
    """Several blocks of rows, and several slices of each part; keeping costs no traffic, so that it pays."""
    machine = replace(plan.CPU, rows=16, columns=16, min_rows=8, min_columns=16, balance=0.0)
    tokens.machine_of = lambda device: machine  # type: ignore[assignment]


def run(leaves: list[Any], labels: Tensor, *, loss: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Values, extras and gradients of one case; `leaves` are hidden, weight and bias, or this rank's part of them."""
    options = dict(options)
    api.Request = functools.partial(Request, plan=options.pop("plan", None))  # type: ignore[misc, assignment]
    wanted = options.pop("trained", (True, True, True))
    leaves = [x.detach().requires_grad_(wish) for x, wish in zip(leaves, wanted, strict=True)]
    hidden, weight, bias = leaves
    if loss:
        ref = torch.linspace(-90, -30, 4)
        out = fastpref.linear_preference_loss(hidden, weight, labels, ref, bias=bias, **options)
        found = {"values": torch.cat([out.chosen_logps, out.rejected_logps, out.losses])}
        total = 3.0 * out.loss
    else:
        out = fastpref.linear_token_logps(hidden, weight, labels, bias=bias, **options)
        values, extras = out if isinstance(out, tuple) else (out, None)
        found = {"values": values}
        total = (values * torch.linspace(-1.5, 2, values.numel()).view(values.shape)).sum()
        if extras is not None:
            found |= {name: x for name, x in extras._asdict().items() if x is not None}
            if options.get("entropy_grad"):
                total = total + (extras.entropy * torch.linspace(2, -1, values.numel()).view(values.shape)).sum()
    if any(wanted):
        total.backward()
    found = {name: x.detach() for name, x in found.items()}
    names = ("hidden", "weight", "bias")
    return found | {f"d {name}": x.grad for name, x in zip(names, leaves, strict=True) if x.requires_grad}


def part(tensors: list[Tensor], sizes: tuple[int, ...], rank: int) -> list[Tensor]:
    hidden, weight, bias = tensors
    return [hidden, weight.split(sizes)[rank], bias.split(sizes)[rank]]


# The workers


def refusals(among: Any, rank: int, size: int) -> dict[str, Callable[[], Any]]:
    """Calls that must raise on every rank; what is wrong is wrong on the last rank alone."""
    tensors, labels = make()
    last = rank == size - 1
    hidden, weight, bias = part(tensors, SIZES[size]["uneven"], rank)
    good: dict[str, Any] = {"vocab_group": among}
    other = labels.clone()
    other[1, 2] += 1
    wrong = labels.clone()
    wrong[1, 2] = V

    def call(*, x: Tensor = hidden, w: Any = weight, y: Tensor = labels, **options: Any) -> Callable[[], Any]:
        return lambda: fastpref.linear_token_logps(x, w, y, **good, **options)

    sequences = functools.partial(fastpref.linear_sequence_logps, hidden, weight, labels, **good)
    pairs = functools.partial(fastpref.linear_preference_loss, hidden, weight, labels, **good)
    packed: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 9 if last else 18, 36]), "shift": False, **good}
    return {
        "budget": call(memory_budget=1000 if last else None),
        "label outside V": call(y=wrong),
        "other labels": call(y=other if last else labels),
        "other mask": call(mask=torch.ones(4, 9) if last else None),
        "other H": call(w=weight[:, 1:] if last else weight),
        "no tensor": call(w=[1.0] if last else weight),
        "other dtype": call(x=hidden.double(), w=weight.double()) if last else call(),
        "bias": call(bias=bias if last else None),
        "temperature": call(temperature=2.0 if last else 1.0),
        "extras": call(extras=("entropy",) if last else ()),
        "gradient": call(x=hidden.clone().requires_grad_(last)),
        "other function": sequences if last else call(),
        "no entries anywhere": call(w=weight[:0]),
        "reduction": functools.partial(sequences, reduction="mean" if last else "sum"),
        "reference": functools.partial(pairs, torch.full((4,), -1.0 if last else -2.0)),
        "beta": functools.partial(pairs, torch.zeros(4), beta=0.2 if last else 0.1),
        "cu_seqlens": lambda: fastpref.linear_sequence_logps(hidden.flatten(0, 1), weight, labels.flatten(), **packed),
        "cu_seqlens of pairs": lambda: fastpref.linear_preference_loss(
            hidden.flatten(0, 1), weight, labels.flatten(), torch.zeros(2), **packed
        ),
        "unknown loss": functools.partial(pairs, torch.zeros(4), loss="dpoo" if last else "sigmoid"),
    }


def work(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Sharded

    rank, size = dist.get_rank(), dist.get_world_size()
    among, found = dist.group.WORLD, {}
    small_tiles()
    for kind, sizes in SIZES[size].items():
        for cases, loss in ((TOKENS, False), (LOSSES, True)):
            for name, case in cases.items():
                options = dict(case)
                tensors, labels = make(options.pop("dtype", torch.float32))
                leaves = part(tensors, sizes, rank)
                found[kind, name] = run(leaves, labels, loss=loss, options={**options, "vocab_group": among})

    mesh = init_device_mesh("cpu", (size,))
    for vocab in (V, 5):  # of 5, the last of four ranks has none
        tensors, labels = make(vocab=vocab)
        leaves = [tensors[0], *(distribute_tensor(x, mesh, [Sharded(0)]) for x in tensors[1:])]
        result = run(leaves, labels, loss=False, options={"vocab_group": among})
        for name in ("d weight", "d bias"):
            assert isinstance(result[name], DTensor)
            assert result[name].placements == (Sharded(0),)
            result[name] = result[name].full_tensor()
        found["DTensor", vocab] = result

    errors = {}
    (hidden, weight, _), labels = make()
    whole, halves = (distribute_tensor(weight, mesh, [how]) for how in (Replicate(), Sharded(1)))
    cases = refusals(among, rank, size)
    for name, placed in (("replicated", whole), ("sharded on H", halves)):
        cases[name] = functools.partial(fastpref.linear_token_logps, hidden, placed, labels, vocab_group=among)
    cases["DTensor without group"] = functools.partial(
        fastpref.linear_token_logps, hidden, distribute_tensor(weight, mesh, [Sharded(0)]), labels
    )
    for name, refused in cases.items():
        try:
            refused()
            errors[name] = "nothing raised"
        except (ValueError, TypeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    torch.save({"found": found, "errors": errors}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# The tests


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, launch: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(__file__, request.param, tmp_path_factory.mktemp(f"vocab-{request.param}"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tiles in this process, and what a case changes put back."""
    monkeypatch.setattr(tokens, "machine_of", tokens.machine_of)
    monkeypatch.setattr(api, "Request", Request)
    small_tiles()


def compare(results: list[dict[str, Any]], wanted: dict[str, Any], rtol: float) -> None:
    """Values, extras and dh bitwise equal on all ranks and near one process's; dW and dbias the parts of its."""
    assert all(set(result) == set(wanted) for result in results)
    for name, truth in wanted.items():
        parts = [result[name] for result in results]
        if name in ("d weight", "d bias"):
            found = torch.cat(parts)
        else:
            found = parts[0]
            assert all(torch.equal(found, other) for other in parts[1:]), name
        assert found.dtype == truth.dtype
        size = truth.float().abs().max().item()
        torch.testing.assert_close(
            found, truth, rtol=rtol, atol=rtol * size, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["uneven", "empty"])
@pytest.mark.parametrize("name", [*TOKENS, *LOSSES])
def test_parts_give_what_the_whole_gives(name: str, kind: str, ranks: list[Any], alone: None) -> None:
    options = dict({**TOKENS, **LOSSES}[name])
    dtype = options.pop("dtype", torch.float32)
    tensors, labels = make(dtype)
    if "memory_budget" in options:
        options["memory_budget"] = None
    wanted = run(tensors, labels, loss=name in LOSSES, options=options)
    compare([rank["found"][kind, name] for rank in ranks], wanted, 1e-6 if dtype == torch.float32 else 2**-7)


def test_compiled_code_refuses_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator would take the part for the whole. What raises while it is traced is left to eager."""
    (hidden, weight, _), labels = make()
    shards = VocabShards(Members(cast(Any, None), 0, 2), (V, V))
    request = Request(1, -100, Transform(), torch.float32, 2**20, shards=shards)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"vocab_group does not go through torch\.compile"):
        api._tokens(Call(hidden, weight, None, labels, None, request))


@pytest.mark.parametrize("vocab", [V, 5])
def test_a_dtensor_has_a_dtensor_as_its_gradient(vocab: int, ranks: list[Any], alone: None) -> None:
    tensors, labels = make(vocab=vocab)
    wanted = run(tensors, labels, loss=False, options={})
    for rank in ranks:
        compare([rank["found"]["DTensor", vocab]], wanted, 1e-6)
    hidden = [rank["found"]["DTensor", vocab]["d hidden"] for rank in ranks]
    assert all(torch.equal(hidden[0], other) for other in hidden[1:])


OWN_ERROR = {  # what the rank says whose argument is wrong; the others name that rank
    "other H": "ValueError: weight must be (V, H) with the H = 12 of the hidden states",
    "no tensor": "TypeError: weight must be a torch.Tensor, got [1.0] (list)",
    "unknown loss": "ValueError: ",
}
EVERY_ERROR = {
    "budget": "ValueError: memory_budget of 1000 bytes is smaller than one tile",
    "label outside V": "ValueError: labels[1, 2] is 101, outside [0, V=101)",
    "other labels": "ValueError: labels (checksum) must be equal on all ranks of vocab_group, got [",
    "other mask": "ValueError: mask (checksum; with shift also of cu_seqlens) must be equal on all ranks of",
    "other dtype": "ValueError: dtypes (checksum) must be equal on all ranks of vocab_group",
    "bias": "ValueError: dtypes (checksum) must be equal",
    "temperature": "ValueError: options (checksum of shift, ignore_index, transforms, extras and entropy_grad) must be",
    "extras": "ValueError: options (checksum of shift, ignore_index, transforms, extras and entropy_grad) must be",
    "gradient": "ValueError: hidden.requires_grad must be equal on all ranks of vocab_group, got [0, ",
    "other function": "ValueError: the ranks of vocab_group are in different calls, this one in linear_",
    "no entries anywhere": "ValueError: weight must have at least one entry on one rank of vocab_group",
    "reduction": "ValueError: reduction and on_empty (checksum) must be equal",
    "reference": "ValueError: ref_logps (checksum) must be equal",
    "beta": "ValueError: loss, beta, its options and reduction (checksum) must be equal",
    "cu_seqlens": "ValueError: cu_seqlens (checksum) must be equal",
    "cu_seqlens of pairs": "ValueError: cu_seqlens (checksum) must be equal",
    "replicated": "ValueError: weight is a DTensor with placements (Replicate(),) over",
    "sharded on H": "it must be sharded on V, (Shard(dim=0),), over exactly the ranks of the group",
    "DTensor without group": "pass their group as vocab_group",
}


@pytest.mark.parametrize("name", [*OWN_ERROR, *EVERY_ERROR])
def test_what_does_not_fit_raises_on_every_rank(name: str, ranks: list[Any]) -> None:
    said = [rank["errors"][name] for rank in ranks]
    if name in EVERY_ERROR:
        assert all(EVERY_ERROR[name] in text for text in said), said
        return
    last = len(ranks) - 1
    assert said[last].startswith(OWN_ERROR[name]), said[last]
    assert all(f"rank {last} of vocab_group refused its arguments" in text for text in said[:last]), said
