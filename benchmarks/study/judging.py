"""The verdicts of an endpoint that judges, on the pairs of methods that the reported findings compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastpref.benchmarks.study.endpoint import Endpoint, Item, Summary, Verdict, judge_pairs, summarise

# Each was reported: win rates of DPO and of DPOP against TRL's trainer, and of SFT against DPOP.
PAIRS = (("dpo", "trl"), ("dpo", "trl_matched"), ("dpop", "trl"), ("dpop", "trl_matched"), ("sft", "dpop"))
VERDICTS = "judge.jsonl"
PREFIX, SUFFIX = "Question: ", "\nAnswer:"


def judge_results(results: dict[str, Any], endpoint: Endpoint, folder: Path, console: Console) -> dict[str, Any]:
    """Ask about every answer of the pairs in `PAIRS` that the results have; the entry "endpoint" of results.json.

    Raises:
        JudgeError: the endpoint cannot judge; what it said before is kept in the folder.
    """
    wanted = _wanted(results)
    total = 2 * sum(len(items) for by_seed in wanted.values() for items in by_seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{endpoint.model} judges", total=total)
        for (name, first, second), by_seed in wanted.items():
            verdicts = [
                judge_pairs(endpoint, items, folder / VERDICTS, lambda count: progress.advance(task, count))
                for items in by_seed
            ]
            rows.append({"set": name, "first": first, "second": second, **_entry(summarise(verdicts))})
            console.print(f"{endpoint.model} on {first} against {second}, {name}: {_counts(verdicts)}", highlight=False)
    return {"model": endpoint.model, "base_url_host": endpoint.host, "pairs": rows}


def _wanted(results: dict[str, Any]) -> dict[tuple[str, str, str], list[list[Item]]]:
    """By set and pair of methods: for each seed, the questions and both answers."""
    cells = {(cell["set"], cell["method"], cell["seed"]): cell for cell in results["cells"]}
    wanted: dict[tuple[str, str, str], list[list[Item]]] = {}
    for name in results["sets"]:
        for first, second in PAIRS:
            if not {first, second} <= set(results["methods"]):
                continue
            wanted[name, first, second] = [
                [
                    Item(prompt.removeprefix(PREFIX).removesuffix(SUFFIX), *answers)
                    for prompt, *answers in zip(
                        results["prompts"][str(seed)],
                        cells[name, first, seed]["answers"],
                        cells[name, second, seed]["answers"],
                        strict=True,
                    )
                ]
                for seed in results["seeds"]
            ]
    return wanted


def _entry(summary: Summary) -> dict[str, Any]:
    return summary._asdict() | {"rate": None if summary.rate is None else list(summary.rate)}


def _counts(verdicts: list[list[Verdict]]) -> str:
    found = summarise(verdicts)
    return f"{found.wins} wins, {found.losses} losses, {found.ties} ties, {found.unreadable} unreadable"
