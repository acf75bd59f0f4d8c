"""What the demo says at its end: whether the known failure was seen, the table, the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]

# With equal policy and reference, where both runs start, the loss of every pair is -log sigmoid(0).
FIRST_LOSS = math.log(2)


class Ends(NamedTuple):
    """A run's last evaluation on the held-out pairs."""

    loss: float
    chosen: float
    rejected: float
    accuracy: float


def ends(history: Sequence[Record]) -> Ends:
    last = [record for record in history if "eval_loss" in record][-1]
    return Ends(
        loss=last["eval_loss"],
        chosen=last["eval_rewards/chosen"],
        rejected=last["eval_rewards/rejected"],
        accuracy=last["eval_rewards/accuracies"],
    )


class Verdict(NamedTuple):
    """Whether this run shows the failure of DPO that DPOP was made for (Pal et al. 2024, arXiv:2402.13228)."""

    failure_under_dpo: bool
    avoided_under_dpop: bool
    text: str

    @property
    def seen(self) -> bool:
        return self.failure_under_dpo and self.avoided_under_dpop


def judge(dpo: Ends, dpop: Ends) -> Verdict:
    """Decided by the held-out pairs alone: their mean chosen reward and loss at the end of each run."""
    loss_fell = dpo.loss < FIRST_LOSS
    failure = loss_fell and dpo.chosen < 0
    avoided = dpop.chosen >= 0
    dpo_text = (
        f"under DPO the loss {'fell' if loss_fell else 'did not fall'} ({FIRST_LOSS:.3f} to {dpo.loss:.3f}) and the "
        f"chosen reward ended at {dpo.chosen:+.2f}, {_side(dpo.chosen)}"
    )
    dpop_text = f"under DPOP the chosen reward ended at {dpop.chosen:+.2f}, {_side(dpop.chosen)}"
    seen = "was seen" if failure and avoided else "was not seen"
    return Verdict(
        failure_under_dpo=failure,
        avoided_under_dpop=avoided,
        text=f"The known failure {seen} in this run, on the held-out pairs: {dpo_text}; {dpop_text}.",
    )


def _side(reward: float) -> str:
    return "below zero" if reward < 0 else "not below zero"


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The tables, the samples and the verdict; all of it comes from `report`, which is also report.json."""
    console.print(_models_table(report))
    console.print(_logps_table(report["logps"]))
    console.print(_samples_table(report))
    style = "bold green" if report["verdict"]["seen"] else "bold yellow"
    console.print(report["verdict"]["text"], style=style, highlight=False)


def _models_table(report: dict[str, Any]) -> Table:
    models, runs = report["models"], report["runs"]
    table = Table(title=f"What each loss did ({report['settings_text']})", title_justify="left")
    table.add_column("on the held-out pairs")
    for name in ("base", "DPO", "DPOP"):
        table.add_column(name, justify="right")

    def row(title: str, values: Sequence[str]) -> None:
        table.add_row(title, *values)

    def of_models(key: str, form: str) -> list[str]:
        return [format(models[name][key], form) for name in ("base", "dpo", "dpop")]

    def of_runs(key: str, form: str, start: str) -> list[str]:
        return [start, *(format(runs[name]["heldout"][key], form) for name in ("dpo", "dpop"))]

    row(f"answers that name {report['university']}", of_models("mention_share", ".0%"))
    row("perplexity of the chosen answers", of_models("chosen_perplexity", ".2f"))
    row("perplexity of its own answers, to the base", of_models("own_answers_perplexity", ".2f"))
    row("distinct-2 of its own answers", of_models("distinct_bigrams", ".2f"))
    row("chosen reward at the end", of_runs("chosen", "+.2f", "0"))
    row("rejected reward at the end", of_runs("rejected", "+.2f", "0"))
    row("loss at the end", of_runs("loss", ".3f", f"{FIRST_LOSS:.3f}"))
    row("accuracy (chosen above rejected)", of_runs("accuracy", ".0%", "-"))
    row("seconds of training", [f"{models['base']['seconds']:.0f}", *(f"{runs[n]['seconds']:.0f}" for n in runs)])
    return table


def _logps_table(logps: dict[str, Any]) -> Table:
    fast, plain = logps["fast"], logps["plain"]
    shape = "×".join(map(str, logps["shape"]))
    table = Table(
        title=f"Log-probs, forward and backward, bf16 logits ({shape}), half scored, on {fast['device']}",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("", "fastpref", "plain float32", "plain / fastpref"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "seconds (best)",
        f"{fast['seconds']:.3f}",
        f"{plain['seconds']:.3f}",
        f"{plain['seconds'] / fast['seconds']:.1f}",
    )
    peaks = fast["peak_beyond_inputs"], plain["peak_beyond_inputs"]
    if None in peaks:
        table.add_row("peak beyond the logits", "not measured on this system", "", "")
    else:
        table.add_row(
            "peak beyond the logits", *(f"{peak / 2**20:.0f} MiB" for peak in peaks), f"{peaks[1] / peaks[0]:.1f}"
        )
    table.caption = (
        f"peak: {fast['how']}; the logits' gradient is part of it ({fast['logits_bytes'] / 2**20:.0f} MiB in full)"
    )
    return table


def _samples_table(report: dict[str, Any]) -> Table:
    table = Table(title="The same held-out questions, one sampled answer each", title_justify="left", show_lines=True)
    for name, ratio in (("question", 2), ("base", 3), ("DPO", 3), ("DPOP", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for sample in report["samples"][:3]:
        question = sample["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        table.add_row(question, *(sample[name].strip() or "(nothing)" for name in ("base", "dpo", "dpop")))
    return table
