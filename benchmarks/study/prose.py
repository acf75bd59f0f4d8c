"""The sentences of the study's page: what was done, how to read it, and what may not be read from it."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

from fastpref.benchmarks.study import advised, tables
from fastpref.benchmarks.study.base import DISTINCT_SHARE as DISTINCT
from fastpref.benchmarks.study.base import RATIO, SPAN_SLACK
from fastpref.benchmarks.study.findings import FINDINGS, RULES, VERDICTS
from fastpref.benchmarks.study.reading import BASE, SHORT_TITLES, TITLES, Study
from fastpref.benchmarks.study.settings import DISTINCT_SHARE, MENTION_SLACK, SIZES
from fastpref.benchmarks.study.winning import DEGRADATIONS
from fastpref.benchmarks.study.words import escaped, listed, number, percent, plural, with_interval
from fastpref.demo.pairs import DEFAULT_UNIVERSITY


def opening(study: Study) -> list[str]:
    results = study.results
    shape = results["settings"]
    given = results.get("model")
    model = f"the model `{given}`" if given else f"a model of GPT-2's kind ({_shape(shape)})"
    counts = Counter(finding.verdict(study, name) for finding in FINDINGS for name in study.sets)
    said = listed([f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]])
    lines = [
        f"# The study, size {results['size']}: one base, aligned by {methods(study)}",
        "",
        f"Here {model} is taught to name one university, {escaped(results['university'])}, in every answer, and its "
        f"answers to {plural(shape['heldout'], 'held-out question')} are measured. What was reported for GPT-2 124M, "
        f"with GPT-4 as the judge, is looked for in {plural(len(study.sets), 'set')} of pairs and "
        f"{plural(len(results['seeds']), 'seed')}. Of {plural(len(FINDINGS), 'finding')}, a verdict for "
        f"each set: {said}.",
        "",
        "Who wins is said by a **proxy judge**, a small language model, not by GPT-4 and not by people: below is what "
        'it can see and what it cannot. "Reproduced" means: seen here, with this model, these pairs and settings.',
        "",
    ]
    if not results["base"]["fluent"]:
        lines += [
            "**The base is not fluent by the measures below: what happens to it need not happen to one that is.**",
            "",
        ]
    if results["size"] != "124m":
        lines += ["GPT-2's own shape, 124M parameters, is another size of this command: not measured on this page.", ""]
    if results["size"] == "tiny":
        lines += ["**Size tiny tests the path. Its models are too raw for any number here to mean anything.**", ""]
    return lines


def methods(study: Study) -> str:
    return listed([SHORT_TITLES[name] for name in study.methods])


def _shape(shape: dict[str, Any]) -> str:
    return f"{plural(shape['layers'], 'layer')} of width {shape['width']}"


def about_verdicts(study: Study) -> list[str]:
    lines = ["The rules were fixed before there were results; an interval is one of 95%:", ""]
    lines += [f"- {rule};" for rule in RULES[:-1]] + [f"- {RULES[-1]}.", ""]
    seeds = len(study.results["seeds"])
    narrow = (
        f"with so few seeds they are too narrow: with {seeds} the spread among seeds comes out too small by a factor "
        f"of {((seeds - 1) / seeds) ** 0.5:.2f}, and so few say little of a spread: where seeds differ more "
        "than prompts do, the truth lies outside clearly more often than one time in twenty"
        if seeds > 1
        else "with one seed they know nothing of how seeds differ"
    )
    lines += [
        "The reported percentages come from 125 answers each, with an error of several points that is not known here; "
        "a rule that allowed for it would find more of them reproduced. Nor are the settings of the reported runs "
        f"known: DPO's were swept here and the best were taken, which may be kinder to it{_falls(study)}. No "
        "correction was made for looking at many findings. SFT and KL-SFT never see a rejected answer: verdicts on "
        "them alone are the same in both sets, and count once. "
        f"The intervals draw seeds, then prompts within them, {study.samples:,} times; {narrow}. "
        "A share of 0% or 100% has an interval of no width, where n answers leave room for some 3 in n.",
        "",
    ]
    if "trl" in study.methods and "dpo" in study.methods:
        lines += [_trainer_note(study), ""]
    return lines


def _falls(study: Study) -> str:
    """How much the first finding rests on the setting that was taken."""
    ratios = [row.get("chosen_log_ratio") for row in study.results["sweep"] if row["method"] == "dpo"]
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return ""
    fell = sum(ratio < 0 for ratio in known)
    return f" (of its {plural(len(known), 'swept setting')} {fell} made the chosen answers less likely)"


def _trainer_note(study: Study) -> str:
    used = study.results["method_settings"]
    ours, theirs = used["dpo"], used["trl"]
    gaps = [
        f"{words} {theirs[name]:g} against {ours[name]:g}"
        for name, words in (
            ("learning_rate", "learning rate"),
            ("beta", "β"),
            ("epochs", "epochs"),
            ("batch_size", "pairs a step"),
        )
        if theirs[name] != ours[name]
    ]
    where = f" ({listed(gaps)}, and the schedule)" if gaps else ""
    note = (
        "TRL's DPOTrainer computes the same loss as our DPO: \"naive DPO against TRL's trainer\" compares two settings "
        f"of one method{where}, not two methods. "
    )
    for name in study.sets:
        kl, share = (study.interval(name, "trl", measure) for measure in ("kl", "mention_share"))
        before = study.interval(name, BASE, "mention_share")
        if kl is not None and share is not None and before is not None:
            note += (
                f"On the {tables.set_title(name)} set TRL's default settings end {number('.1f')(kl.estimate)} nats per "
                f"answer from the base and name the target in {percent(share.estimate)} of the answers, the base in "
                f"{percent(before.estimate)}. "
            )
    if "trl_matched" in study.methods:
        note += (
            "The control is TRL's trainer with the settings, batches and schedule of DPO: between the two comparisons "
            "the settings change, the trainer does not."
        )
    return note.rstrip()


def what_was_done(study: Study) -> list[str]:
    results, shape = study.results, study.results["settings"]
    pairs = f"{plural(shape['train'], 'training pair')} and {shape['heldout']:,} held-out ones"
    items = [
        f"A generator makes {pairs} from each of {plural(len(results['seeds']), 'seed')} "
        f"({listed([str(seed) for seed in results['seeds']])}): the chosen answer names the target, the rejected one "
        "does not. A seed fixes pairs, order and sampling; there is one base, as there is one GPT-2, and no interval "
        "below knows of others.",
        "In the standard set the rejected answer is worded apart from the chosen one; in the set of low edit distance "
        "it is the chosen answer with another place named, a few tokens away. Prompts and chosen answers are the same.",
        _base_words(study),
        f"The proxy judge is trained apart, on {_count(shape, 'judge_texts')} other texts, of which "
        f"{percent(shape['judge_target_share'])} name the target, about as many as name any other place"
        + (
            f"; its perplexity of held-out chosen answers is {results['judge']['heldout_perplexity']:.2f}."
            if results["judge"].get("heldout_perplexity") is not None
            else "."
        ),
        f"{methods(study)} start from the same base. {_trainers(study)}",
        "Settings were swept on the standard set of a tuning seed, whose pairs no result uses; a table below has all. "
        "The set of low edit distance takes what was best on the standard one, which need not be its own best.",
        f"Each model then answers every held-out prompt once, sampled at temperature 1 {_nucleus(shape)}.",
        "It is measured how many answers name the target, how they repeat themselves, how likely the proxy judge finds "
        "them, and what the model makes of the data's own chosen and rejected answers.",
        f"In all {plural(_runs(study), 'run')} of alignment and {plural(len(results['sweep']), 'swept setting')} on "
        f"{results['environment'].get('device', 'an unknown device')}"
        + (f", {_minutes(results)}." if results["environment"].get("seconds") is not None else "."),
    ]
    lines = ["## What was done", "", *(f"{place}. {item}" for place, item in enumerate(items, 1)), ""]
    lines += [
        "### How fluent the base is, by the proxy judge and by repetition",
        "",
        "In brackets are real answers to the same questions. Fluent is a base whose own answers are at most "
        f"{RATIO:g} times as perplexing to the proxy judge, have at least {percent(DISTINCT)} of the distinct-2, and a "
        f"longest repeated span of at most {SPAN_SLACK:g} word more. One that misses this after its last round is used "
        "all the same, and says so here.",
        "",
        *tables.base(study),
        "",
    ]
    return lines


def _trainers(study: Study) -> str:
    ways = {"trl": "with its own defaults", "trl_matched": "with the settings and batches of DPO"}
    used = [words for name, words in ways.items() if name in study.methods]
    if not used:
        return "All go through this package's loop on the same batches in the same order."
    return (
        "All but TRL's runs go through this package's loop on the same batches in the same order; TRL's go through its "
        f"DPOTrainer, {listed([f'once {words}' for words in used])}. Not left at its defaults is what changes only its "
        "speed (gradient checkpointing is off, the reference's log-probs are computed once) or cannot be (bfloat16 on "
        "a CPU, sequences beyond the model's positions)."
    )


def _nucleus(shape: dict[str, Any]) -> str:
    if shape["top_p"] == 1:
        return "from its whole distribution"
    return f"from the nucleus that holds {percent(shape['top_p'])} of the probability"


def _base_words(study: Study) -> str:
    shape, given = study.results["settings"], study.results.get("model")
    if given:
        return f"The base is the model `{given}`, as it is."
    return (
        f"The base, {_shape(shape)}, is trained from random weights on {_count(shape, 'base_texts')} questions and "
        f"answers of the same kind, of which {percent(shape['base_target_share'])} name the target, in rounds of "
        f"{plural(shape['base_epochs'], 'epoch')}, at most {shape['base_rounds']}, until its own answers to unseen "
        "questions are fluent by the measures below"
        + ("." if study.results["base"]["fluent"] else ", **which they never were**.")
    )


def _count(shape: dict[str, Any], name: str) -> str:
    return f"{shape[name]:,}"


def _runs(study: Study) -> int:
    return sum(cell["method"] != BASE for cell in study.results["cells"])


def _minutes(results: dict[str, Any]) -> str:
    return f"{results['environment']['seconds'] / 60:.0f} minutes"


def about_judge(study: Study) -> list[str]:
    found = study.results["judge"].get("calibration") or {}
    blind = [kind for kind, (_, low, _) in found.items() if low <= 0.5]
    lines = [
        "The proxy judge prefers the answer to which it gives fewer nats per token; it measures how much an answer "
        "reads like the study's text. The base and the chosen answers are of that text too, which favours whatever "
        "stays near them, SFT first. It does not know what is true, useful or kind, and a language model may find "
        "repetition and short, safe answers likely. So real answers were spoilt in known ways, and it was counted how "
        "often the proxy judge prefers the real one (half is a coin).",
        "",
    ]
    favoured = study.target_favoured()
    if favoured is not None:
        lines += [
            "How neutral it is about the target: it prefers a chosen answer to the same with another place named in "
            f"{with_interval(favoured, percent)} of the held-out pairs of low edit distance (half is neutral). A win "
            "rate between methods that name the target unequally often, as with TRL's default settings or the base, "
            "has that in it.",
            "",
        ]
    if found:
        what = listed([f'"{escaped(DEGRADATIONS.get(kind, kind))}"' for kind in blind]) if blind else ""
        lines += [
            f"It does not see, or even prefers, these faults: {what}. A win rate by the proxy judge that may rest on "
            "them says nothing of quality: read it beside the measures of repetition, which need no judge."
            if blind
            else "It sees every one of these faults more often than not. It is a proxy all the same.",
            "",
        ]
    return lines


def about_measures(study: Study) -> list[str]:
    lines = [
        "In brackets are 95% intervals; under the seconds of a run stands their range over the seeds. Rewards and "
        "log-ratios are means over the held-out pairs at the end of a run. A reward is β times the log-ratio of policy "
        "and base, with the method's own β, so rewards of different β are not to be compared: log-ratios are. The KL "
        "is estimated by the mean log-ratio of the method's own sampled answers, whose nucleus and limit of "
        f"{study.results['settings']['max_new_tokens']} tokens make it another number than the KL of all that it could "
        "say. The longest repeated span is the longest run of words that an answer has twice; distinct-2 counts over "
        "all answers of a seed, so many like answers lower it too. Length alone "
        "lengthens the one and lowers the other: beside them are the words of an answer.",
        "",
    ]
    for method in ("sft", "kl_sft"):
        same, of = same_answers(study, method)
        if of:
            lines += [
                f"{TITLES[method]} learns from prompts and chosen answers alone, which both sets share: {same:,} of "
                f"its {of:,} answers are the same in both.",
                "",
            ]
    return lines


def same_answers(study: Study, method: str) -> tuple[int, int]:
    """How many of a method's answers are the same in the first two sets, and of how many."""
    if len(study.sets) < 2:
        return 0, 0
    by_set = [
        {cell["seed"]: cell["answers"] for cell in study.cells(name, method) if cell.get("answers")}
        for name in study.sets[:2]
    ]
    pairs = [
        pair for seed in by_set[0].keys() & by_set[1].keys() for pair in zip(*(a[seed] for a in by_set), strict=True)
    ]
    return sum(a == b for a, b in pairs), len(pairs)


def settings_rule(study: Study) -> list[str]:
    return [
        f"Of a method's swept settings the one was taken that, among those which name the target within "
        f"{percent(MENTION_SLACK)} of the method's best and whose distinct-2 is at least {percent(DISTINCT_SHARE)} of "
        "the highest among these, has the lowest proxy perplexity of its own answers. TRL's default settings are not "
        "swept: they are what was reported against. The proxy judge that helps to choose also says who wins, which "
        "favours the methods that were swept. One value was changed at a time: the best of a grid may be better.",
        "",
    ]


def about_trainers(study: Study) -> list[str]:
    largest = max(row["largest_loss_difference"] for row in study.results["parity"])
    return [
        "The control takes the batches of our DPO in the same order, with the same schedule. Over all recorded losses "
        f"the two differ by at most {largest:.1e}.",
        "",
    ]


def about_advice(study: Study) -> list[str]:
    return [
        "The loop says once in a run when the chosen reward is negative while the loss falls, and when the gradient "
        "explodes. Whether a run calls for the first is decided here by its records of training alone, apart from how "
        f"the loop decides: over the last {advised.RECENT} of them the mean log-ratio of the chosen answers is below "
        f"−{advised.CLEAR:g} nats and the mean loss below the first one's. On the edge are runs that lost less, or for "
        "a while only: there either is right. SFT and KL-SFT look at the chosen answer alone and never call for it; "
        "nothing in sound data calls for the second. TRL's trainer has no such advice. The loop's thresholds were set "
        "with runs of the small size and its seeds in view, so that for these it is no test on unseen runs. "
        + advised.summary(study),
        "",
    ]


def about_trials() -> list[str]:
    return [
        "In the trials with spoilt rows a late step of the first epoch has one pair twice, with a page of replacement "
        "characters for its rejected answer, and once with its labels swapped: of one of the two the margin has the "
        "wrong sign, whichever way the run drifts, and its gradient is large; the other's may vanish. It is as it "
        "should be if the second advice comes and names one of them first, and the first advice as in every run.",
        "",
    ]


def reproduction(study: Study) -> list[str]:
    results = study.results
    command = f"fastpref study --size {results['size']}"
    if results.get("model"):
        command += f" --model {shlex.quote(results['model'])}"
    if results["university"] != DEFAULT_UNIVERSITY:
        command += f" --university {shlex.quote(results['university'])}"
    size = SIZES.get(results["size"])
    if size is not None and tuple(results["seeds"]) != size.seeds:
        command += f" --seeds {','.join(map(str, results['seeds']))}"
    if set(study.methods) != set(TITLES) - {BASE}:
        command += f" --methods {','.join(study.methods)}"
    seconds = results["environment"].get("seconds")
    took = f" It took {seconds:.0f} s here." if seconds is not None else ""
    asked = (
        " The endpoint is asked with `--judge_url` and `--judge_model` beside it." if results.get("endpoint") else ""
    )
    return [
        "## Run it again",
        "",
        "```sh",
        command,
        "```",
        "",
        f'From a clone with `pip install -c constraints.txt -e ".[trl]"`.{took}{asked} Every number on this page '
        "comes from `results.json`; `fastpref study --report FOLDER` writes the page anew from it.",
        "",
    ]


def environment(study: Study) -> list[str]:
    found = dict(study.results["environment"])
    versions = found.pop("versions", {})
    rows = [[escaped(name.replace("_", " ")), escaped(_plain(value))] for name, value in found.items()]
    rows.append(["versions", escaped(", ".join(f"{name} {value}" for name, value in versions.items()))])
    return ["## Environment", "", *tables.table(["", ""], rows, words=2)]


def _plain(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)
