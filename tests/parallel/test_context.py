"""Sequences that are split over ranks: values, lengths and gradients of one process that holds them whole.

One launch of four gloo processes; cases run in groups of two of them and in one of all four, and with the vocabulary
split as well on a mesh of two by two.
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
from fastpref import reference

B, H, V = 3, 6, 23
IGNORED = -100

# name: sizes of the parts in a group of two, and of four; whether rows are packed; options
CASES: dict[str, tuple[list[int], list[int], Any, dict[str, Any]]] = {
    "uneven": ([9, 7], [3, 0, 8, 5], None, {"reduction": "mean", "return_lengths": True}),
    "first and last empty": ([0, 16], [0, 12, 4, 0], None, {}),
    "one position each": ([1, 1], [1, 1, 1, 1], None, {"return_lengths": True}),
    "aligned": ([5, 11], [1, 6, 0, 9], None, {"shift": False, "return_lengths": True}),
    "masked": ([8, 8], [3, 5, 2, 6], None, {"masked": True, "reduction": "mean", "temperature": 0.7, "softcap": 5.0}),
    "other labels": ([8, 8], [3, 5, 2, 6], None, {"dtype": torch.int16, "ignore_index": 3}),
    "zigzag": ([8, 8], [4, 4, 4, 4], None, {"context_layout": "zigzag", "masked": True, "return_lengths": True}),
    "zigzag, aligned": ([8, 8], [4, 4, 4, 4], None, {"context_layout": "zigzag", "shift": False}),
    "zigzag of one": ([2, 2], [2, 2, 2, 2], None, {"context_layout": "zigzag"}),
    # A border at a split, borders that a part does not reach, a sequence over several parts, empty ones.
    "packed": ([9, 15], [5, 4, 0, 15], [0, 0, 9, 10, 10, 22, 24], {"return_lengths": True, "reduction": "mean"}),
    "packed, aligned": ([9, 15], [5, 4, 0, 15], [0, 9, 9, 22, 24], {"shift": False, "masked": True}),
    "packed, one sequence": ([20, 4], [1, 1, 18, 4], [0, 24], {"masked": True}),
}


def whole(
    name: str, ranks: int
) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None, dict[str, Any], list[int]]:
    """hidden, weight and bias (float32 leaves), labels, mask, cu_seqlens, options, sizes of the parts."""
    two, four, offsets, options = CASES[name]
    sizes = two if ranks == 2 else four
    generator = torch.Generator().manual_seed(len(name))
    shape = (sum(sizes),) if offsets else (B, sum(sizes))
    tensors = [torch.randn(*s, generator=generator) for s in ((*shape, H), (V, H), (V,))]
    options = dict(options)
    labels = torch.randint(V, shape, generator=generator)
    if not offsets:
        labels[1, -1] = IGNORED
        labels[2] = IGNORED  # nothing to score
    labels[labels == IGNORED] = options.get("ignore_index", IGNORED)
    labels = labels.to(options.pop("dtype", torch.int64))
    mask = torch.rand(shape, generator=generator) < 0.7 if options.pop("masked", False) else None
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32) if offsets else None
    return tensors, labels, mask, cu_seqlens, options, sizes


def part(x: Tensor | None, rank: int, sizes: list[int], layout: str, dim: int) -> Any:
    """What a rank holds of x along T."""
    if x is None:
        return None
    if layout == "zigzag":
        chunks = x.chunk(2 * len(sizes), dim)
        return torch.cat([chunks[rank], chunks[-1 - rank]], dim)
    return x.split(sizes, dim)[rank]


def loss_of(values: Tensor) -> Tensor:
    return (values * torch.linspace(-1, 2, len(values))).sum()


def call(path: str, tensors: list[Tensor], labels: Tensor, **options: Any) -> Any:
    hidden, weight, bias = tensors
    if path == "linear":
        return fastpref.linear_sequence_logps(hidden, weight, labels, bias=bias, **options)
    return fastpref.sequence_logps(hidden @ weight.T + bias, labels, **options)


def results(found: Any, leaves: list[Tensor]) -> dict[str, Any]:
    values, lengths = found if isinstance(found, tuple) else (found, None)
    gradients = torch.autograd.grad(loss_of(values), leaves)
    return {"values": values.detach(), "lengths": lengths, "gradients": gradients}


def scored(path: str, name: str, group: dist.ProcessGroup, vocab: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """A case on this rank; with `vocab`, also the head is split over that group."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    (hidden, weight, bias), labels, mask, cu_seqlens, options, sizes = whole(name, ranks)
    layout, dim = options.get("context_layout", "contiguous"), labels.dim() - 1
    if vocab is not None:
        at = 8
        weight, bias = (x[:at] if dist.get_rank(vocab) == 0 else x[at:] for x in (weight, bias))
        options["vocab_group"] = vocab
    leaves = [x.clone().requires_grad_() for x in (part(hidden, rank, sizes, layout, dim), weight, bias)]
    mine, mask = (part(x, rank, sizes, layout, dim) for x in (labels, mask))
    found = call(path, leaves, mine, mask=mask, cu_seqlens=cu_seqlens, context_group=group, **options)
    return results(found, leaves)


def raises(path: str, group: dist.ProcessGroup, name: str = "uneven", **changes: Any) -> str:
    """The error of a case in which an argument is another one; a list has one for each rank."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    tensors, labels, mask, cu_seqlens, options, sizes = whole(name, ranks)
    labels, hidden = (part(x, rank, sizes, "contiguous", labels.dim() - 1) for x in (labels, tensors[0]))
    arguments = {"labels": labels, "mask": mask, "cu_seqlens": cu_seqlens, **options, **changes}
    arguments = {key: value[rank] if isinstance(value, list) else value for key, value in arguments.items()}
    if callable(arguments["labels"]):
        arguments["labels"] = arguments["labels"](labels)
    try:
        call(path, [hidden, *tensors[1:]], context_group=group, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def set_label(place: tuple[int, int], value: int) -> Callable[[Tensor], Tensor]:
    def change(labels: Tensor) -> Tensor:
        changed = labels.clone()
        changed[place] = value
        return changed

    return change


def same(labels: Tensor) -> Tensor:
    return labels


# What one rank's argument is, or every rank's; what each of two says.
REFUSED = "refused its arguments (its own error says why), so no rank of the group goes on"
WRONG: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "a label outside V": (
        {"labels": [same, set_label((1, 2), V)]},
        (f"ValueError: rank 1 of context_group {REFUSED}", f"labels[1, 2] is {V}, outside [0, V={V})"),
    ),
    "a label outside V that another rank scores": (
        {"labels": [same, set_label((0, 0), -7)]},
        (f"ValueError: rank 1 of context_group {REFUSED}", f"labels[0, 0] is -7, outside [0, V={V})"),
    ),
    "labels of another shape": (
        {"labels": [lambda labels: labels[:, 1:], same]},
        ("ValueError: labels must have the shape (3, 9) of the", f"ValueError: rank 0 of context_group {REFUSED}"),
    ),
    "no labels": (
        {"labels": [same, lambda labels: None]},
        (f"ValueError: rank 1 of context_group {REFUSED}", "TypeError: labels must be a torch.Tensor, got None"),
    ),
    "a layout that there is not": (
        {"context_layout": ["contiguous", "striped"]},
        (f"ValueError: rank 1 of context_group {REFUSED}", "context_layout must be one of contiguous, zigzag; got 'st"),
    ),
    "a temperature that cannot be": (
        {"temperature": -1.0},
        ("ValueError: temperature must be a finite number", "ValueError: temperature must be a finite number"),
    ),
    "temperatures that differ": (
        {"temperature": [0.5, 0.6]},
        ("temperature, logit_scale and softcap (checksum) must be equal on all ranks",) * 2,
    ),
    "reductions that differ": (
        {"reduction": ["sum", "mean"]},
        ('reduction="mean" must be equal on all ranks of context_group, got [0, 1] on ranks 0 to 1',) * 2,
    ),
    "shifts that differ": (
        {"shift": [True, False]},
        ("shift must be equal on all ranks of context_group, got [1, 0] on ranks 0 to 1",) * 2,
    ),
    "zigzag parts that differ": (
        {"context_layout": "zigzag"},
        ('context_layout="zigzag" needs two chunks of one size on every rank: got T_r = [9, 7]; pad the sequences to a '
         "multiple of 4",) * 2,
    ),
    "extras of shifted labels": (
        {"extras": ("entropy",)},
        ("extras=('entropy',) with context_group need shift=False",) * 2,
    ),
    "an empty sequence": ({"on_empty": "raise"}, ("ValueError: sequences [2] of 3 have no scored token",) * 2),
    "offsets with padded rows": (
        {"cu_seqlens": torch.tensor([0, 16])},
        ("ValueError: cu_seqlens goes with packed rows (N_r, ...), got",) * 2,
    ),
}  # fmt: skip
WRONG_PACKED: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "zigzag": ({"context_layout": "zigzag"}, ('context_layout="zigzag" does not go with packed rows',) * 2),
    "offsets of the parts": (
        {"cu_seqlens": torch.tensor([0, 9])},
        ("cu_seqlens must be offsets into the whole row, which ends at 24 (the ranks of context_group hold [9, 15] "
         "rows of it), got [0, 9]",) * 2,
    ),
    "offsets that differ": (
        {"cu_seqlens": [torch.tensor([0, 3, 24]), torch.tensor([0, 4, 24])]},
        ("cu_seqlens (checksum) must be equal on all ranks of context_group",) * 2,
    ),
    "as many sequences as not": (
        {"cu_seqlens": [torch.tensor([0, 3, 24]), torch.tensor([0, 24])]},
        ("the number of sequences must be equal on all ranks of context_group, got [2, 1] on ranks 0 to 1",) * 2,
    ),
    "offsets that fall": (
        {"cu_seqlens": [torch.tensor([0, 24]), torch.tensor([0, 5, 3, 24])]},
        (f"ValueError: rank 1 of context_group {REFUSED}", "cu_seqlens must begin with 0 and never decrease"),
    ),
    "no offsets": ({"cu_seqlens": None}, ("need cu_seqlens to say where sequences begin",) * 2),
}  # fmt: skip
PATHS = ("logits", "linear")


def work(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    found: dict[Any, Any] = {
        (path, name, size): scored(path, name, groups[size]) for path in PATHS for name in CASES for size in groups
    }
    for path in PATHS:
        for name in ("uneven", "zigzag", "packed"):
            found[path, name, "mesh"] = scored(path, name, groups[2], columns[rank % 2])
        for name, (changes, _) in WRONG.items():
            found[path, name] = raises(path, groups[2], **changes)
        for name, (changes, _) in WRONG_PACKED.items():
            found[path, name] = raises(path, groups[2], "packed", **changes)
    found["budget"] = raises("linear", groups[2], memory_budget=["1GiB", 1])
    found["mesh"] = mesh_refusals(groups[2], columns[rank % 2])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def mesh_refusals(group: dist.ProcessGroup, column: dist.ProcessGroup) -> list[str]:
    """One rank of the mesh has a wrong argument: all four must hear of it."""
    first = dist.get_rank() == 0
    common = {"name": "uneven", "vocab_group": column}
    return [
        raises("linear", group, **common, reduction="avg" if first else "sum"),
        raises("linear", group, **common, memory_budget=1 if first else "1GiB"),
        raises("linear", group, **common, reduction="mean" if first else "sum"),
    ]


@pytest.fixture(scope="module")
def ranks(launch: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return launch(__file__, 4, tmp_path_factory.mktemp("context"))


def alone(path: str, name: str, size: int) -> tuple[dict[str, Any], Tensor]:
    """The case on one process, and the values' float64 truth."""
    tensors, labels, mask, cu_seqlens, options, _ = whole(name, size)
    options.pop("context_layout", None)
    leaves = [x.clone().requires_grad_() for x in tensors]
    found = results(call(path, leaves, labels, mask=mask, cu_seqlens=cu_seqlens, **options), leaves)
    options = {key: value for key, value in options.items() if key != "return_lengths"}
    logits = tensors[0].double() @ tensors[1].double().T + tensors[2].double()
    truth: Any = reference.sequence_logps(
        logits, labels, mask=mask, cu_seqlens=cu_seqlens, dtype=torch.float64, **options
    )
    return found, truth


def check(path: str, name: str, size: int, parts: list[dict[str, Any]], columns: int = 1) -> None:
    """The parts, in rank order, against one process; each context rank has `columns` parts of the head."""
    wanted, truth = alone(path, name, size)
    _, labels, _, _, options, sizes = whole(name, size)
    layout, dim = options.get("context_layout", "contiguous"), labels.dim() - 1
    for rank, found in enumerate(parts):
        assert found["values"].dtype == torch.float32
        assert torch.equal(found["values"], parts[0]["values"]), "other bits than rank 0"
        torch.testing.assert_close(found["values"].double(), truth, rtol=1e-5, atol=0)
        torch.testing.assert_close(found["values"], wanted["values"], rtol=1e-6, atol=0)
        assert (found["lengths"] is None) == (wanted["lengths"] is None)
        if wanted["lengths"] is not None:
            assert torch.equal(found["lengths"], wanted["lengths"])
        dh = part(wanted["gradients"][0], rank // columns, sizes, layout, dim)
        first = rank // columns * columns
        # From its part of the logits each rank has a part of dh; the linear path has summed them.
        same_rows = parts[first : first + columns] if path == "logits" else [found]
        ours = torch.stack([one["gradients"][0] for one in same_rows]).sum(0)
        torch.testing.assert_close(ours, dh, rtol=2e-5, atol=1e-5)
    for index in (1, 2):
        # Over the ranks of a context group gradients of parameters are summed; of the head each column has a part.
        sums = [sum(found["gradients"][index] for found in parts[column::columns]) for column in range(columns)]
        torch.testing.assert_close(torch.cat(sums), wanted["gradients"][index], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_parts_of_sequences_have_the_values_and_gradients_of_the_whole(
    ranks: Any, path: str, name: str, size: int
) -> None:
    """The values with the same bits on all ranks; the gradients of parameters summed over the ranks."""
    for first in range(0, 4, size):
        check(path, name, size, [found[path, name, size] for found in ranks[first : first + size]])


@pytest.mark.parametrize("name", ["uneven", "zigzag", "packed"])
@pytest.mark.parametrize("path", PATHS)
def test_sequences_and_vocabulary_may_both_be_split(ranks: Any, path: str, name: str) -> None:
    order = [ranks[rank][path, name, "mesh"] for rank in (0, 2, 1, 3)]  # context rank, then vocabulary rank
    check(path, name, 2, order, columns=2)


@pytest.mark.parametrize("case", [*WRONG, *WRONG_PACKED])
@pytest.mark.parametrize("path", PATHS)
def test_every_rank_raises_where_one_cannot_go_on(ranks: Any, path: str, case: str) -> None:
    _, messages = {**WRONG, **WRONG_PACKED}[case]
    for rank, found in enumerate(ranks):
        assert messages[rank % 2] in found[path, case]


def test_a_budget_too_small_for_one_rank_stops_all(ranks: Any) -> None:
    for rank, found in enumerate(ranks):
        assert ("memory_budget" if rank % 2 else f"rank 1 of context_group {REFUSED}") in found["budget"]


def test_a_refusal_reaches_every_rank_of_a_mesh(ranks: Any) -> None:
    """Rank 0's, also those that are neither in its context group nor in its vocabulary group."""
    refused, budget, differs = zip(*(found["mesh"] for found in ranks), strict=True)
    assert "reduction must be one of mean, sum; got 'avg'" in refused[0]
    assert "memory_budget" in budget[0]
    assert "rank 0 of vocab_group refused" in refused[2]
    assert "memory_budget" in budget[2], "the least budget of the vocabulary's ranks counts for all of them"
    for errors in (refused, budget):
        assert all("rank 0 of context_group refused" in errors[rank] for rank in (1, 3))
    assert all('reduction="mean" must be equal on all ranks of vocab_group' in differs[rank] for rank in (0, 2))
    assert all("rank 0 of context_group refused" in differs[rank] for rank in (1, 3))


@pytest.mark.parametrize("path", PATHS)
def test_a_layout_without_a_group_is_refused(path: str) -> None:
    tensors, labels, *_ = whole("uneven", 2)
    with pytest.raises(ValueError, match=r"context_layout='zigzag' goes with context_group, which is None"):
        call(path, tensors, labels, context_layout="zigzag")
