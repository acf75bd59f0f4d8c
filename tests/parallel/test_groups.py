"""What ranks agree on before they communicate, and statistics of parts of a vocabulary: nobody hangs, all raise.

One launch of four gloo processes: cases run in groups of two of them and in one of all four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.parallel.groups import Members, agree, checksum, gather, members, sum_over
from fastpref.parallel.vocab import RowStatistics, VocabShards, combine

NAMES = ("maximum", "total", "target", "weighted", "squares", "sum_z")


def raises(function: Callable[[], Any]) -> str:
    try:
        return repr(function())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refuse(on: int, among: Members, error: Exception) -> Mapping[str, int]:
    if among.rank == on:
        raise error
    return {"T": 3}


def agreements(among: Members) -> dict[str, str]:
    """What each case gives on this rank: the facts of all, or its error."""
    rank = among.rank
    cases: dict[str, Callable[[], Any]] = {
        "equal": lambda: agree("some_group", "call", among, lambda: {"T": 3, "B": -(2**63)}),
        "may differ": lambda: agree("some_group", "call", among, lambda: {"T": rank}, differ=("T",)),
        "nothing": lambda: agree("some_group", "call", among, dict),
        "differ": lambda: agree("some_group", "call", among, lambda: {"T": 3, "B": rank // (among.size - 1)}),
        "one refuses": lambda: agree("some_group", "call", among, lambda: refuse(1, among, TypeError("no tensor"))),
        "other calls": lambda: agree("some_group", f"call {rank % 2}", among, lambda: {"T": 3}),
        "other calls, other facts": lambda: agree(
            "some_group", f"call {rank % 2}", among, lambda: dict.fromkeys("abcdefg"[: 3 + rank], 3)
        ),
        "too large": lambda: agree("some_group", "call", among, lambda: {"ignore_index": 2**63 if rank == 0 else 0}),
        "too many": lambda: agree(
            "some_group", "call", among, lambda: dict.fromkeys(map(str, range(20 if rank == 0 else 2)), 1)
        ),
    }
    return {name: raises(case) for name, case in cases.items()}


def part_of(z: Tensor, labels: Tensor, start: int, stop: int) -> RowStatistics:
    """As a kernel makes them: of z (N, V) the columns start..stop; its maximum does not see a NaN beside a number."""
    part = z[:, start:stop]
    nothing = torch.full((len(z),), -torch.inf, dtype=z.dtype)
    maximum = part.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1) if stop > start else nothing
    moved = part - torch.where(maximum == -torch.inf, 0.0, maximum)[:, None]
    exp = moved.exp()
    here = (labels >= start) & (labels < stop)
    target = z.gather(1, torch.where(here, labels, 0)[:, None])[:, 0]
    weighted = torch.where(exp == 0, 0.0, exp * moved).sum(1)
    return RowStatistics(
        maximum, exp.sum(1), torch.where(here, target, 7.0), weighted, exp.square().sum(1), part.sum(1)
    )


def rows() -> tuple[Tensor, Tensor]:
    """Logits (N, 10) and labels of every kind."""
    z = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[1] *= 300  # all weight in one part
    z[2, :4] = -torch.inf  # a part without any
    z[3] = -torch.inf
    z[4, 4:], z[4, 8] = -2000.0, torch.nan  # in a part without any weight
    z[5, 9] = -torch.inf
    return z, torch.tensor([0, 3, 4, 9, 2, -1])


def statistics(among: Members, ends: list[int]) -> dict[str, Any]:
    z, labels = rows()
    shards = VocabShards(among, tuple(b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)))
    mine = part_of(z, labels, shards.offset, shards.offset + shards.size)
    owner = shards.owner(labels)
    return {
        "all": combine(mine, owner, among)._asdict(),
        "fewer": combine(RowStatistics(*mine[:3]), owner, among)._asdict(),
        "no rows": combine(RowStatistics(*(x[:0] for x in mine)), owner[:0], among)._asdict(),
        "owner": owner,
        "known": (shards.vocab, shards.offset, shards.size),
    }


def work(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 2]), dist.new_group([3, 1])]  # ranks of a group need not follow each other
    pair, other = (pairs[0], pairs[1]) if rank in (0, 2) else (pairs[1], pairs[0])
    among, everyone = members("vocab_group", pair), members("vocab_group", dist.group.WORLD)
    results: dict[str, Any] = {
        "members": [tuple(among[1:]), tuple(everyone[1:])],
        "not a member": raises(lambda: members("vocab_group", other)),
        "no group": raises(lambda: members("vocab_group", "cuda")),
        "mesh": raises(lambda: members("vocab_group", dist.init_device_mesh("cpu", (4,)))),
        "two": agreements(among),
        "four": agreements(everyone),
        "gather": gather(torch.tensor([[rank, 1]]).T, among),
        "gather of nothing": gather(torch.empty(2, 0), everyone).shape,
        "sum": sum_over(torch.tensor([rank, 1.0]), among),
        "shards": statistics(among, [4, 10]),
        "empty shards": statistics(everyone, [0, 4, 4, 10]),
        "in order": sorted({(r, tuple(dist.get_process_group_ranks(g))) for r, g in enumerate(pairs)}),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(launch: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(__file__, 4, tmp_path_factory.mktemp("groups"))


def group_of(ranks: list[dict[str, Any]], group: str) -> list[list[dict[str, str]]]:
    """The results of the groups of two, or of the one of four, in rank order."""
    if group == "four":
        return [[found["four"] for found in ranks]]
    return [[ranks[r]["two"] for r in pair] for pair in ((0, 2), (1, 3))]


@pytest.mark.parametrize("group", ["two", "four"])
def test_ranks_that_agree_know_the_facts_of_all(ranks: Any, group: str) -> None:
    for found in group_of(ranks, group):
        size = len(found)
        assert [case["equal"] for case in found] == [repr([{"T": 3, "B": -(2**63)}] * size)] * size
        assert [case["may differ"] for case in found] == [repr([{"T": rank} for rank in range(size)])] * size
        assert [case["nothing"] for case in found] == [repr([{}] * size)] * size


@pytest.mark.parametrize("group", ["two", "four"])
def test_every_rank_raises_where_facts_differ_or_calls_do(ranks: Any, group: str) -> None:
    for found in group_of(ranks, group):
        last = len(found) - 1
        values = [0] * last + [1]
        for rank, case in enumerate(found):
            assert case["differ"] == (
                f"ValueError: B must be equal on all ranks of some_group, got {values} on ranks 0 to {last}"
            )
            for name in ("other calls", "other calls, other facts"):
                assert case[name] == (
                    f"ValueError: the ranks of some_group are in different calls, this one in call {rank % 2}: "
                    "all must make the same one"
                )


@pytest.mark.parametrize("group", ["two", "four"])
@pytest.mark.parametrize(
    ("case", "refusing", "error"),
    [
        ("one refuses", 1, "TypeError: no tensor"),
        ("too large", 0, f"ValueError: ignore_index must fit 64 bits, got {2**63}"),
        ("too many", 0, "AssertionError: call exchanges 20 facts, more than 18"),
    ],
)
def test_every_rank_raises_where_one_refuses(ranks: Any, group: str, case: str, refusing: int, error: str) -> None:
    """The one that refuses its own error, the others one that names it; also where the exchange cannot be made."""
    for found in group_of(ranks, group):
        for rank, cases in enumerate(found):
            assert cases[case] == (
                error
                if rank == refusing
                else f"ValueError: rank {refusing} of some_group refused its arguments (its own error says why), so no "
                "rank of the group goes on"
            )


def test_a_subgroup_has_ranks_of_its_own_and_others_are_refused(ranks: Any) -> None:
    assert [found["members"] for found in ranks] == [
        [(0, 2), (0, 4)], [(0, 2), (1, 4)], [(1, 2), (2, 4)], [(1, 2), (3, 4)],
    ]  # fmt: skip
    for rank, found in enumerate(ranks):
        assert found["not a member"] == (
            f"ValueError: this process (rank {rank}) is not in vocab_group: only its members may call"
        )
        assert found["no group"].startswith("TypeError: vocab_group must be a torch.distributed.ProcessGroup, got 'cud")
        assert "TypeError" in found["mesh"]
        assert found["mesh"].endswith("of a DeviceMesh pass mesh.get_group(dim)")


def test_gather_and_sum_stay_in_their_group(ranks: Any) -> None:
    for pair in ((0, 2), (1, 3)):
        for rank in pair:
            assert ranks[rank]["gather"].tolist() == [[[r], [1]] for r in pair]
            assert ranks[rank]["sum"].tolist() == [sum(pair), 2.0]
            assert ranks[rank]["gather of nothing"] == (4, 2, 0)


@pytest.mark.parametrize(("group", "owners"), [("shards", [0, 0, 1, 1, 0, -1]), ("empty shards", [1, 1, 3, 3, 1, -1])])
def test_parts_combine_to_the_statistics_of_the_whole(ranks: Any, group: str, owners: list[int]) -> None:
    """Parts that are empty or hold −inf alone, NaN in one, a label in none: as one part would have it, same bits."""
    z, labels = rows()
    whole = part_of(z, labels, 0, 10)._asdict()
    assert whole["total"][4].isnan()
    # What the sums hold is not said where there is no weight at all (row 3); the maximum says that there is none.
    some = torch.tensor([0, 1, 2, 4, 5])
    first = ranks[0][group]
    assert [found[group]["owner"].tolist() for found in ranks] == [owners] * 4
    for name in NAMES:
        found = first["all"][name]
        if name == "target":
            assert found[:4].tolist() == z[range(4), labels[:4]].tolist()
            assert found[5].isnan(), "nobody has the label"
        elif name in ("maximum", "sum_z"):
            torch.testing.assert_close(found, whole[name], rtol=1e-14, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(found[some], whole[name][some], rtol=1e-14, atol=0, equal_nan=True)
        for other in ranks[1:]:
            again = other[group]["all"][name]
            assert torch.equal(again.view(torch.int64), found.view(torch.int64)), f"other bits of {name}"
    assert first["all"]["maximum"][3] == -torch.inf
    fewer = first["fewer"]
    assert [name for name in NAMES if fewer[name] is not None] == ["maximum", "total", "target"]
    assert all(len(x) == 0 for x in first["no rows"].values())


def test_shards_know_their_place(ranks: Any) -> None:
    assert [found["shards"]["known"] for found in ranks] == [(10, 0, 4), (10, 0, 4), (10, 4, 6), (10, 4, 6)]
    assert [found["empty shards"]["known"] for found in ranks] == [(10, 0, 0), (10, 0, 4), (10, 4, 0), (10, 4, 6)]


def test_a_checksum_tells_values_and_places_apart() -> None:
    """Permutations, swaps that undo each other, shifts by a constant, missing and present masks: all differ."""
    values = [[1, 2, 2, 1], [2, 1, 1, 2], [1, 1, 2, 2], [2, 3, 3, 2], [1, 2, 2, 1, 0], [0, 0], [0], [], [-100, 5]]
    sums = [checksum(torch.tensor(row, dtype=torch.int64)) for row in values]
    assert len({*sums, checksum(None)}) == len(sums) + 1
    some = torch.randint(-100, 2**31, (300, 7), generator=torch.Generator().manual_seed(0))
    assert len({checksum(row[torch.randperm(7)]) for row in some}) == 300
    assert checksum(some.T.contiguous().T) == checksum(some)
    assert checksum(some.int()) == checksum(some)
    assert checksum(torch.tensor([True, False])) == checksum(torch.tensor([1, 0]))


def test_a_group_needs_an_initialised_process() -> None:
    with pytest.raises(ValueError, match=r"vocab_group needs torch\.distributed\.init_process_group first"):
        members("vocab_group", None)
