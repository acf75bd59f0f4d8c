"""The study's page and its pictures, written from the results alone; and what the command prints at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastpref.benchmarks.study import advised, compared, plots, tables
from fastpref.benchmarks.study.findings import FINDINGS, REPRODUCED, UNDECIDED, Outcome
from fastpref.benchmarks.study.prose import (
    about_advice,
    about_judge,
    about_measures,
    about_trainers,
    about_trials,
    about_verdicts,
    environment,
    opening,
    reproduction,
    settings_rule,
    what_was_done,
)
from fastpref.benchmarks.study.reading import BASE, MEASURES, SAMPLES, TITLES, Results, Study
from fastpref.benchmarks.study.winning import DEGRADATIONS
from fastpref.benchmarks.study.words import with_interval, writer

PAGE = "README.md"


def write_report(results: Results, folder: Path, *, samples: int = SAMPLES) -> Path:
    """Write README.md and its pictures into the folder; the same results give the same Markdown, byte for byte."""
    study = Study(results, samples=samples)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    page.write_text(markdown(study, _draw(study, folder)), encoding="utf-8")
    return page


def markdown(study: Study, pictures: set[str]) -> str:
    """The page, with those of its pictures that there are."""
    lines = [
        *opening(study),
        *_verdicts(study),
        *what_was_done(study),
        *_measures(study, pictures),
        *_training(study, pictures),
        *_wins(study, pictures),
        *_settings(study, pictures),
        *_advice(study),
        *_samples(study),
        *reproduction(study),
        *environment(study),
    ]
    return "\n".join(lines) + "\n"


def _draw(study: Study, folder: Path) -> set[str]:
    """The names of the pictures for which the results have something to draw."""
    drawn = set()

    def target(name: str) -> Path:
        drawn.add(name)
        return folder / name

    trained = [name for name in study.sets if study.present(name, base=False)]
    for name in trained:
        plots.training(study, name, target(f"training-{name}.png"))
    if trained:
        plots.margins(study, target("margins.png"))
        plots.drift(study, target("drift.png"))
        compared.wins(study, target("wins.png"))
        compared.answers(study, target("answers.png"))
    if study.results["sweep"]:
        compared.sweep(study, target("sweep.png"))
    return drawn


def _picture(pictures: set[str], name: str, words: str) -> list[str]:
    return [f"![{words}]({name})", ""] if name in pictures else []


def _verdicts(study: Study) -> list[str]:
    return [
        "## Which of the reported findings hold here",
        "",
        *tables.verdicts(study),
        "",
        *about_verdicts(study),
    ]


def _measures(study: Study, pictures: set[str]) -> list[str]:
    lines = ["## What each method did", ""]
    lines += _picture(
        pictures, "answers.png", "Share of answers that name the target, longest repeated span, distinct-2"
    )
    for name in study.sets:
        lines += [
            f"### The {tables.set_title(name)} set: its own answers, with the perplexity of the proxy judge",
            "",
            *tables.measures(study, name, tables.SAID),
            "",
            f"### The {tables.set_title(name)} set: what it makes of the held-out pairs' answers",
            "",
            *tables.measures(study, name, tables.SCORED, seconds=True),
            "",
        ]
    return lines + about_measures(study)


def _training(study: Study, pictures: set[str]) -> list[str]:
    lines = ["## Training", ""]
    for name in study.sets:
        words = f"Loss, chosen and rejected rewards over the steps of each method, {tables.set_title(name)} set"
        lines += _picture(pictures, f"training-{name}.png", words)
    lines += _picture(pictures, "margins.png", "Reward margins and accuracies on the held-out pairs")
    lines += _picture(pictures, "drift.png", "Log-ratio of the held-out chosen answers, and KL per own answer")
    return lines


def _wins(study: Study, pictures: set[str]) -> list[str]:
    lines = ["## Win rates by the proxy judge", "", *about_judge(study)]
    lines += [*tables.calibration(study, DEGRADATIONS), ""]
    lines += _picture(pictures, "wins.png", "Win rates of each method against each other by the proxy judge")
    for name in study.sets:
        lines += [
            f"### By the proxy judge, {tables.set_title(name)} set: wins of the row's method",
            "",
            *tables.proxy_wins(study, name),
            "",
        ]
    if study.results.get("endpoint"):
        lines += [
            "### By the model behind an endpoint",
            "",
            f"`{study.results['endpoint']['model']}` at `{study.results['endpoint']['base_url_host']}` was asked too. "
            "A tie counts one half; what could not be read counts nothing.",
            "",
            *tables.endpoint(study),
            "",
        ]
    return lines


def _settings(study: Study, pictures: set[str]) -> list[str]:
    lines = ["## Settings", "", *tables.settings(study), "", *settings_rule(study)]
    lines += _picture(pictures, "sweep.png", "What each swept setting changes, with the perplexity of the proxy judge")
    if study.results["sweep"]:
        lines += ["### Every swept setting, with the perplexity of the proxy judge", "", *tables.swept(study), ""]
    if study.results["parity"]:
        lines += ["### TRL's trainer with DPO's settings", "", *about_trainers(study), *tables.parity(study), ""]
    return lines


def _advice(study: Study) -> list[str]:
    lines = ["## The loop's advice", "", *about_advice(study)]
    if advised.judged(study):
        lines += [*advised.cells_table(study), ""]
    if study.results["advice_trials"]:
        lines += ["### Trials of the advice", "", *about_trials(), *advised.trials_table(study), ""]
    for kind, text in advised.words_said(study).items():
        lines += [f"What it says of {kind}, in full:", "", f"> {tables.escaped(text)}", ""]
    return lines


def _samples(study: Study) -> list[str]:
    lines = [
        "## Samples side by side",
        "",
        "The same held-out questions of the first seed, evenly spaced and not picked, and one sampled answer each.",
        "",
    ]
    for name in study.sets:
        lines += [f"### {tables.set_title(name).capitalize()} set", "", *tables.samples(study, name), ""]
    return lines


def print_summary(console: Console, results: Results, *, samples: int = SAMPLES) -> None:
    """The main table of each set and the verdicts."""
    study = Study(results, samples=samples)
    shown = ("mention_share", "longest_span", "distinct_2", "proxy_perplexity", "chosen_perplexity", "chosen_log_ratio")
    for name in study.sets:
        table = Table(title=f"{tables.set_title(name)} set, held-out prompts, 95% intervals", title_justify="left")
        table.add_column("")
        for measure in shown:
            table.add_column(MEASURES[measure].title, justify="right", overflow="fold")
        for method in [BASE, *study.methods]:
            cells = []
            for measure in shown:
                interval = study.interval(name, method, measure)
                own = method == BASE and measure == "chosen_log_ratio"
                text = "–" if own else with_interval(interval, writer(MEASURES[measure].form), between="\n")
                cells.append(text.replace("[", "\\["))
            table.add_row(TITLES[method], *cells)
        console.print(table)
    verdicts = Table(title="Reported findings", title_justify="left")
    for column in ("reported", "set", "verdict", "here"):
        verdicts.add_column(column, overflow="fold")
    for finding in FINDINGS:
        for name in study.sets:
            for outcome in finding.outcomes(study, name):
                color = {REPRODUCED: "green", UNDECIDED: "yellow"}.get(outcome.verdict, "")
                words = f"[{color}]{outcome.verdict}[/]" if color else outcome.verdict
                verdicts.add_row(finding.reported, tables.set_title(name), words, _here(outcome))
    console.print(verdicts)


def _here(outcome: Outcome) -> str:
    against = f", against {TITLES[outcome.against]}" if outcome.against else ""
    judge = f", by {outcome.judge}" if outcome.judge else ""
    return f"{outcome.numbers}{against}{judge}".replace("[", "\\[")
