"""The verdicts of an endpoint that judges, on the pairs of methods that the reported findings compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpref.benchmarks.study.endpoint import Endpoint, Item, judge_pairs, summarise
from fastpref.console import Console

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
    rows = []
    with console.bar(f"{endpoint.model} judges", total, unit="request") as bar:
        for (name, first, second), by_seed in wanted.items():
            verdicts = [judge_pairs(endpoint, items, folder / VERDICTS, bar.advance) for items in by_seed]
            summary = summarise(verdicts)
            rate = None if summary.rate is None else list(summary.rate)
            rows.append({"set": name, "first": first, "second": second, **summary._asdict(), "rate": rate})
            counts = ", ".join(f"{getattr(summary, count)} {count}" for count in summary._fields[:4])
            console.say(f"{endpoint.model} on {first} against {second}, {name}: {counts}")
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
