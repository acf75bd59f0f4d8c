"""The tables of the study's page, as lines of Markdown: verdicts, measures, win rates, settings, sweep, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpref.benchmarks.study.findings import FINDINGS, Outcome
from fastpref.benchmarks.study.measures import Interval
from fastpref.benchmarks.study.reading import BASE, MEASURES, SET_TITLES, SHORT_TITLES, TITLES, Study
from fastpref.benchmarks.study.words import MISSING, escaped, number, percent, plural, table, with_interval, writer

# Two tables a set: what a model says itself, and what it makes of the data's answers.
SAID = ("mention_share", "words", "longest_span", "longest_span_95", "distinct_2", "proxy_perplexity", "kl")
SCORED = ("chosen_perplexity", "chosen_log_ratio", "rejected_log_ratio", "chosen_reward", "rejected_reward", "accuracy")
SAMPLES = 4
LONGEST_SAMPLE = 60  # words
NO_BETA = ("sft", "kl_sft")  # whose losses it is no part of: it scales what they report as rewards
LOSSES = {"sigmoid": "DPO", "dpop": "DPOP", "sft": "cross-entropy", "kl_sft": "cross-entropy + drift penalty"}


def set_title(name: str) -> str:
    return SET_TITLES.get(name, name)


def verdicts(study: Study) -> list[str]:
    """A row for each finding, and for each trainer and judge that it is looked at with; a column for each set."""
    rows = []
    for finding in FINDINGS:
        by_set = {name: finding.outcomes(study, name) for name in study.sets}
        ways = dict.fromkeys((one.against, one.judge) for outcomes in by_set.values() for one in outcomes)
        for place, way in enumerate(ways):
            cells = [_outcome(by_set[name], way) for name in study.sets]
            rows.append(["" if place else finding.reported, _way(*way), *cells])
    return table(["reported", "compared", *(set_title(name) for name in study.sets)], rows, words=2 + len(study.sets))


def _outcome(outcomes: Sequence[Outcome], way: tuple[str | None, str | None]) -> str:
    for outcome in outcomes:
        if (outcome.against, outcome.judge) == way:
            return f"**{outcome.verdict}**<br>{outcome.numbers}"
    return "–"


def _way(against: str | None, judge: str | None) -> str:
    parts = []
    if against is not None:
        control = ", the control" if against == "trl_matched" else ", as reported" if against == "trl" else ""
        parts.append(f"against {TITLES[against]}{control}")
    if judge is not None:
        parts.append(f"by {escaped(judge)}")
    return "<br>".join(parts)


def measures(study: Study, pair_set: str, names: Sequence[str], *, seconds: bool = False) -> list[str]:
    """A row for each method, a column for each measure with its interval; the seconds with their range over seeds."""
    rows = []
    for method in [BASE, *study.methods]:
        cells = [interval_cell(study, pair_set, method, name) for name in names]
        rows.append([TITLES[method], *cells, *([_seconds(study, pair_set, method)] if seconds else [])])
    if names == SAID:
        rows.append(["the data's chosen answers", *(_interval(study.real(pair_set, n), n) for n in SAID[:-1]), "–"])
    return table(["", *(MEASURES[name].title for name in names), *(["seconds"] if seconds else [])], rows)


def interval_cell(study: Study, pair_set: str, method: str, name: str) -> str:
    if method == BASE and name not in ("chosen_perplexity", *SAID[:-1]):
        return "–"  # the base against itself
    return _interval(study.interval(pair_set, method, name), name)


def _interval(interval: Interval | None, name: str) -> str:
    return with_interval(interval, writer(MEASURES[name].form), between="<br>")


def _seconds(study: Study, pair_set: str, method: str) -> str:
    found = [cell["seconds"] for cell in study.cells(pair_set, method) if cell.get("seconds") is not None]
    if method == BASE:
        return "–"
    if not found:
        return MISSING
    return f"{sum(found) / len(found):.0f}<br>{min(found):.0f} to {max(found):.0f}"


def proxy_wins(study: Study, pair_set: str) -> list[str]:
    """How often the proxy judge prefers the row's answer to the column's."""
    names = study.present(pair_set)

    def cell(first: str, second: str) -> str:
        if first == second:
            return "–"
        return with_interval(study.proxy_wins(pair_set, first, second), percent, between="<br>")

    rows = [[TITLES[first], *(cell(first, second) for second in names)] for first in names]
    return table(["wins of, against", *(SHORT_TITLES[name] for name in names)], rows)


def endpoint(study: Study) -> list[str]:
    rows = [
        [
            set_title(pair["set"]),
            TITLES[pair["first"]],
            TITLES[pair["second"]],
            *(f"{pair[name]:,}" for name in ("wins", "losses", "ties", "unreadable")),
            with_interval(study.endpoint_wins(pair["set"], pair["first"], pair["second"]), percent),
        ]
        for pair in study.results["endpoint"]["pairs"]
    ]
    return table(["set", "first", "second", "wins", "losses", "ties", "unreadable", "first wins"], rows, words=3)


def calibration(study: Study, kinds: dict[str, str]) -> list[str]:
    """How often the proxy judge prefers a real answer to the same one spoilt; `kinds` says what each spoiling is."""
    found: dict[str, Sequence[float]] = study.results["judge"].get("calibration") or {}
    rows = []
    for kind, (estimate, low, high) in sorted(found.items(), key=lambda item: -item[1][0]):
        sees = "sees it" if low > 0.5 else "is blind to it" if high >= 0.5 else "prefers the spoilt one"
        values = f"{percent(estimate)} [{percent(low)}, {percent(high)}]"
        rows.append([escaped(kinds.get(kind, kind)), values, sees])
    return table(["how the real answer was spoilt", "the real one preferred", "the proxy judge"], rows)


def settings(study: Study) -> list[str]:
    rows = []
    for method in study.methods:
        used = study.results["method_settings"][method]
        options = ", ".join(f"{name} {value:g}" for name, value in (used.get("options") or {}).items())
        tried = [row["changed"] for row in study.results["sweep"] if row["method"] == method]
        rows.append(
            [
                TITLES[method],
                "TRL's" if used["trainer"] == "trl" else "this package's",
                LOSSES.get(used["loss"], escaped(used["loss"])),
                "–" if used["loss"] in NO_BETA else f"{used['beta']:g}",
                f"{used['learning_rate']:.3g}",
                str(used["epochs"]),
                str(used["batch_size"]),
                options or "–",
                escaped("; ".join(tried)) or "not swept",
                escaped(used.get("why") or "–"),
            ]
        )
    names = ["", "trainer", "loss", "β", "learning rate", "epochs", "batch", "of the loss", "tried", "taken"]
    return table(names, rows, words=3)


def swept(study: Study) -> list[str]:
    rows = []
    for row in study.results["sweep"]:
        mark = "**" if row["chosen"] else ""
        values = [
            _value(row, "mention_share", percent),
            _value(row, "chosen_log_ratio", number("+.1f")),
            _value(row, "chosen_perplexity", number(".2f")),
            _value(row, "proxy_perplexity", number(".2f")),
            _value(row, "distinct_2", number(".3f")),
            _value(row, "longest_span", number(".1f")),
            _value(row, "seconds", number(".0f")),
        ]
        advice = ", ".join(name.replace("_", " ") for name in row["advice"]) or "–"
        rows.append([TITLES[row["method"]], f"{mark}{escaped(row['changed'])}{mark}", *values, advice])
    titles = [MEASURES[name].title for name in ("mention_share", "chosen_log_ratio", "chosen_perplexity")]
    more = [MEASURES[name].title for name in ("proxy_perplexity", "distinct_2", "longest_span")]
    return table(["", "setting", *titles, *more, "seconds", "advice"], rows, words=2)


def _value(row: dict[str, Any], name: str, write: Any) -> str:
    return MISSING if row.get(name) is None else write(row[name])


def parity(study: Study) -> list[str]:
    rows = [
        [set_title(row["set"]), str(row["seed"]), str(row["steps"]), f"{row['largest_loss_difference']:.1e}"]
        for row in study.results["parity"]
    ]
    return table(["set", "seed", "losses compared", "largest difference"], rows)


def base(study: Study) -> list[str]:
    """What the base said after each round, beside the real answers to the same prompts."""
    rows = [
        [
            "none: as it was given" if study.results.get("model") else str(found["epoch"]),
            f"{found['own_perplexity']:.2f} ({found['real_perplexity']:.2f})",
            f"{found['distinct_2']:.3f} ({found['real_distinct_2']:.3f})",
            f"{found['longest_span']:.1f} ({found['real_longest_span']:.1f})",
            "yes" if found["fluent"] else "**no**",
        ]
        for found in study.results["base"]["rounds"]
    ]
    return table(["epochs", "proxy perplexity", "distinct-2", "longest repeated span", "fluent"], rows)


def samples(study: Study, pair_set: str) -> list[str]:
    """The same few held-out questions of the first seed, a column each; a row for each method's sampled answer."""
    seed = study.results["seeds"][0]
    prompts, chosen = study.results["prompts"][str(seed)], study.results["chosen"][str(seed)]
    places = sorted({place * len(prompts) // SAMPLES for place in range(SAMPLES)})
    rows = []
    for method in study.present(pair_set):
        answers = [cell["answers"] for cell in study.cells(pair_set, method) if cell["seed"] == seed]
        rows += [[TITLES[method], *(sample(given[place]) for place in places)] for given in answers if given]
    rows.append(["the data's chosen answer", *(sample(chosen[place]) for place in places)])
    return table(["", *(question(prompts[place]) for place in places)], rows, words=1 + len(places))


def question(prompt: str) -> str:
    return escaped(prompt.removeprefix("Question: ").removesuffix("\nAnswer:"))


def sample(answer: str) -> str:
    words = answer.strip().split(" ")
    if len(words) > LONGEST_SAMPLE:
        more = plural(len(words) - LONGEST_SAMPLE, "more word")
        return f"{escaped(' '.join(words[:LONGEST_SAMPLE]))} … *({more})*"
    return escaped(answer.strip()) or "*(nothing)*"
