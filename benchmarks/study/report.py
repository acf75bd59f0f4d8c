"""The study's page and its pictures, written from the results alone; and what the command prints at its end."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fastpref.benchmarks.study import advised, plots
from fastpref.benchmarks.study.findings import FINDINGS, VERDICTS
from fastpref.benchmarks.study.measures import Interval
from fastpref.benchmarks.study.reading import BASE, MEASURES, SAMPLES, SET_TITLES, SHORT_TITLES, TITLES, Results, Study
from fastpref.benchmarks.study.settings import SIZES
from fastpref.benchmarks.study.winning import DEGRADATIONS
from fastpref.benchmarks.study.words import escaped, number, with_interval
from fastpref.demo.pairs import DEFAULT_UNIVERSITY
from fastpref.folders import check_file
from fastpref.tables import markdown_table, print_table

PAGE = "README.md"
TITLE = "# The study, size "  # how every page of it begins
# Two tables a set: what a model says itself, and what it makes of the data's answers.
SAID = ("mention_share", "words", "longest_span", "longest_span_95", "distinct_2", "proxy_perplexity", "kl")
SCORED = ("chosen_perplexity", "chosen_log_ratio", "rejected_log_ratio", "chosen_reward", "rejected_reward", "accuracy")
PRINTED = ("mention_share", "longest_span", "distinct_2", "proxy_perplexity", "chosen_perplexity", "chosen_log_ratio")
QUESTIONS = 4
LONGEST_SAMPLE = 60  # words
NONE = "–"


def write_report(results: Results, folder: Path, *, samples: int = SAMPLES) -> Path:
    """Write README.md and its pictures into the folder; the same results give the same Markdown, byte for byte.

    Raises:
        FolderError: one of these files is there, and no study wrote it; then nothing is written.
    """
    study = Study(results, samples=samples)
    pictures, page = plots.pictures(study), folder / PAGE
    for path, mark in [(page, TITLE), *((folder / name, "Matplotlib") for name in pictures)]:
        check_file(path, mark=mark, option="the report's")
    text = markdown(study, pictures)
    for name, draw in pictures.items():
        draw(folder / name)
    page.write_text(text, encoding="utf-8")
    return page


def markdown(study: Study, pictures: Collection[str]) -> str:
    """The page, from the template texts/page.md, with those of its pictures that there are."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "cell": lambda value: escaped(str(value)),
        "number": lambda value, form: number(form)(value),
        "interval": lambda values, form: with_interval(Interval(*values) if values else None, form),
        "plain": _plain,
        "words": lambda name: name.replace("_", " "),
    }
    template = files(__package__).joinpath("texts", "page.md").read_text(encoding="utf-8")
    counts = Counter(finding.outcomes(study, name)[0].verdict for finding in FINDINGS for name in study.sets)
    return environment.from_string(template).render(
        results=study.results,
        study=study,
        shape=study.results["settings"],
        pictures=pictures,
        methods=TITLES,
        sets=SET_TITLES,
        counts={verdict: counts[verdict] for verdict in VERDICTS},
        verdicts=verdicts(study),
        said=lambda pair_set: measures(study, pair_set, SAID),
        scored=lambda pair_set: measures(study, pair_set, SCORED),
        wins=lambda pair_set: proxy_wins(study, pair_set),
        samples=lambda pair_set: samples(study, pair_set),
        seconds=lambda method: _seconds(study, method),
        degradations=DEGRADATIONS,
        advice=advised.judged(study),
        trial_right=advised.trial_right,
        first_named=advised.first_named,
        command=command(study),
    )


def verdicts(study: Study) -> str:
    """A row for each finding, and for each trainer and judge that it is looked at with; a column for each set."""
    rows = []
    for finding in FINDINGS:
        by_set = [{one[2:]: one for one in finding.outcomes(study, name)} for name in study.sets]
        for place, way in enumerate(dict.fromkeys(way for outcomes in by_set for way in outcomes)):
            found = [outcomes.get(way) for outcomes in by_set]
            cells = [NONE if one is None else f"**{one.verdict}**<br>{one.numbers}" for one in found]
            against, judge = way
            compared = [f"against {TITLES[against]}"] if against else []
            compared += [f"by {escaped(judge)}"] if judge else []
            rows.append(["" if place else finding.reported, "<br>".join(compared), *cells])
    header = ["reported", "compared", *(SET_TITLES[name] for name in study.sets)]
    return "\n".join(markdown_table(header, rows, len(header)))


def measures(study: Study, pair_set: str, names: Sequence[str]) -> str:
    """A row for each method, a column for each measure with its interval."""
    rows = [[TITLES[method], *(_measure(study, pair_set, method, name) for name in names)] for method in study.every]
    if names == SAID:
        real = [_interval(study.real(pair_set, name), name) for name in SAID[:-1]]
        rows.append(["the data's chosen answers", *real, NONE])
    return "\n".join(markdown_table(["", *(MEASURES[name].title for name in names)], rows))


def _measure(study: Study, pair_set: str, method: str, name: str, *, between: str = "<br>") -> str:
    if method == BASE and name not in ("chosen_perplexity", *SAID[:-1]):
        return NONE  # the base against itself
    return _interval(study.interval(pair_set, method, name), name, between=between)


def _interval(interval: Interval | None, name: str, *, between: str = "<br>") -> str:
    return with_interval(interval, MEASURES[name].form, between=between)


def _seconds(study: Study, method: str) -> float | None:
    """The mean time of a run, over sets and seeds."""
    found = [cell["seconds"] for name in study.sets for cell in study.cells(name, method) if cell.get("seconds")]
    return sum(found) / len(found) if found else None


def proxy_wins(study: Study, pair_set: str) -> str:
    """How often the proxy judge prefers the row's answer to the column's."""
    names = study.present(pair_set)

    def cell(first: str, second: str) -> str:
        if first == second:
            return NONE
        return with_interval(study.proxy_wins(pair_set, first, second), "percent", between="<br>")

    rows = [[TITLES[first], *(cell(first, second) for second in names)] for first in names]
    return "\n".join(markdown_table(["wins of, against", *(SHORT_TITLES[name] for name in names)], rows))


def samples(study: Study, pair_set: str) -> str:
    """The same few held-out questions of the first seed, a column each; a row for each method's sampled answer."""
    seed = study.results["seeds"][0]
    prompts, chosen = study.results["prompts"][str(seed)], study.results["chosen"][str(seed)]
    places = sorted({place * len(prompts) // QUESTIONS for place in range(QUESTIONS)})
    rows = []
    for method in study.present(pair_set):
        answers = [cell["answers"] for cell in study.cells(pair_set, method) if cell["seed"] == seed]
        rows += [[TITLES[method], *(_sample(given[place]) for place in places)] for given in answers if given]
    rows.append(["the data's chosen answer", *(_sample(chosen[place]) for place in places)])
    asked = [escaped(prompts[place].removeprefix("Question: ").removesuffix("\nAnswer:")) for place in places]
    return "\n".join(markdown_table(["", *asked], rows, 1 + len(asked)))


def _sample(answer: str) -> str:
    words = answer.strip().split(" ")
    if len(words) > LONGEST_SAMPLE:
        return f"{escaped(' '.join(words[:LONGEST_SAMPLE]))} … *({len(words) - LONGEST_SAMPLE} more words)*"
    return escaped(answer.strip()) or "*(nothing)*"


def command(study: Study) -> str:
    """What runs the same study again."""
    results = study.results
    words = ["fastpref", "study", "--size", results["size"]]
    if results.get("model"):
        words += ["--model", results["model"]]
    if results["university"] != DEFAULT_UNIVERSITY:
        words += ["--university", results["university"]]
    size = SIZES.get(results["size"])
    if size is not None and tuple(results["seeds"]) != size.seeds:
        words += ["--seeds", ",".join(map(str, results["seeds"]))]
    if set(study.methods) != set(TITLES) - {BASE}:
        words += ["--methods", ",".join(study.methods)]
    return shlex.join(words)


def _plain(value: Any) -> str:
    """A value of the environment: lists and mappings with commas between."""
    if isinstance(value, dict):
        return _plain([f"{name} {_plain(one)}" for name, one in value.items()])
    if isinstance(value, list):
        return ", ".join(value) or NONE
    return NONE if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)


def print_summary(results: Results, *, samples: int = SAMPLES) -> None:
    """The main table of each set and the verdicts."""
    study = Study(results, samples=samples)
    for name in study.sets:
        rows = [
            [TITLES[method], *(_measure(study, name, method, measure, between=" ") for measure in PRINTED)]
            for method in study.every
        ]
        header = ["", *(measure.replace("_", " ") for measure in PRINTED)]
        title = f"{SET_TITLES[name]} set, held-out prompts, 95% intervals"
        print_table(title, header, rows, words=("",))
    found = [
        [finding.reported, SET_TITLES[name], one.verdict, _here(one.numbers, one.against, one.judge)]
        for finding in FINDINGS
        for name in study.sets
        for one in finding.outcomes(study, name)
    ]
    header = ["reported", "set", "verdict", "here"]
    print_table("Reported findings", header, found, words=header)


def _here(numbers: str, against: str | None, judge: str | None) -> str:
    return numbers + (f", against {TITLES[against]}" if against else "") + (f", by {judge}" if judge else "")
