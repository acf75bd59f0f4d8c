"""`fastpref train --dry_run`: what a run would do and need, printed before any compute is spent. Nothing is written."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fastpref.tables import print_table, size_text
from fastpref.training.data.tokens import Pair, Response
from fastpref.training.memory.oom import what_to_change
from fastpref.training.memory.plan import MemoryPlan, available_memory, plan_memory
from fastpref.training.run import Run

WORDS = ("", "tokens a pair", "a pair's")  # columns that hold names
# Tokens shown at the beginning and the end of a prompt, and of a response; the border of the two is always there.
PROMPT, RESPONSE = (16, 24), (40, 16)
BORDER, OPEN, CLOSE = "│", "⟦", "⟧"  # which no tokenizer's special tokens have
CONTINUED = "⋯"
CHARACTER = 4  # bytes, so tokens, at most
BROKEN = "\N{REPLACEMENT CHARACTER}"
PARTS = f"{BORDER} parts tokens, {CONTINUED} goes on with a character"
LEGEND = {
    True: f"{PARTS}; those in green are scored",
    False: f"{PARTS}; those in {OPEN}brackets{CLOSE} are scored",
}


@dataclass(frozen=True)
class DryRun:
    """What a dry run found; sizes in bytes, lengths in tokens."""

    lengths: dict[str, tuple[int, int, int, int]]  # of prompt, chosen, rejected, longest sequence: least, median, ...
    schedule: dict[str, int]
    memory: MemoryPlan
    available: int
    fits: bool | None  # None where the activations are not known


def dry_run(run: Run) -> DryRun:
    """Print the report on the main process; every process gets the same."""
    memory = plan_memory(run)
    available, whose = available_memory(run.accelerator.device, run.accelerator.num_processes)
    total = memory.total(checkpointing=memory.checkpointing)
    report = DryRun(
        lengths=_lengths(run),
        schedule=_schedule(run),
        memory=memory,
        available=available,
        fits=None if total is None else total <= available,
    )
    if run.accelerator.is_main_process:
        _print(run, report, whose)
    return report


def _lengths(run: Run) -> dict[str, tuple[int, int, int, int]]:
    names = ("response", "mismatched response") if run.spec.unpaired else ("chosen response", "rejected response")
    found = {
        "prompt": [len(pair.prompt) for pair in run.pairs],
        names[0]: [len(pair.chosen.ids) - pair.chosen.start for pair in run.pairs],
        names[1]: [len(pair.rejected.ids) - pair.rejected.start for pair in run.pairs],
        "longer sequence": [pair.length for pair in run.pairs],
    }
    return {name: _spread(values) for name, values in found.items()}


def _spread(values: Sequence[int]) -> tuple[int, int, int, int]:
    """Least, median, 95th percentile (nearest rank), most."""
    ranked = sorted(values)
    return ranked[0], round(median(ranked)), ranked[-(-95 * len(ranked) // 100) - 1], ranked[-1]


def _schedule(run: Run) -> dict[str, int]:
    config, steps, plan = run.config, run.steps, run.plan
    records = steps // run.log_every + (run.log_every > 1) + (steps % run.log_every > 0 and steps > 1)
    evaluations = 0
    if run.eval_pairs:
        every = config.eval_every or steps
        evaluations = steps // every + (steps % every > 0)
    first = plan.step(0)
    return {
        "steps": steps,
        "pairs a step": plan.per_step,
        "micro-batches in the first step": len(plan.micro_batches(first)),
        "steps an epoch": plan.steps_per_epoch,
        "tokens an epoch": sum(plan.sizes.tokens),
        "metric records": records,
        "evaluations": evaluations,
        "checkpoints": steps // config.save_every if config.save_every else 0,
    }


def _print(run: Run, report: DryRun, whose: str) -> None:
    print("\n".join(_model_lines(run)))
    header = ("tokens a pair", "min", "median", "p95", "max")
    rows = [(name, *(f"{value:,}" for value in spread)) for name, spread in report.lengths.items()]
    print_table(
        f"data: {len(run.pairs):,} pairs to train on, {len(run.eval_pairs):,} held out", header, rows, words=WORDS
    )
    at_limit = sum(len(ids) == run.max_length for pair in run.pairs for ids in (pair.chosen.ids, pair.rejected.ids))
    print(
        f"{at_limit:,} of {2 * len(run.pairs):,} sequences have all of max_length={run.max_length:,}, or were cut to it"
    )

    schedule = [(name, f"{value:,}") for name, value in report.schedule.items()]
    print_table(f"schedule: {run.plan.epoch(run.steps):.2f} epochs", ("", "number"), schedule, words=WORDS)
    print(_reference_line(run))
    _print_memory(run, report, whose)
    color = sys.stdout.isatty()
    print()
    encoding = sys.stdout.encoding or "utf-8"
    for line in show_pair(run.pairs[0], run.tokenizer, max_length=run.max_length, color=color):
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    print(f"\ndry run: nothing was trained, and nothing was written to {run.output_dir}")


def _model_lines(run: Run) -> list[str]:
    model, tokenizer, text = run.model, run.tokenizer, run.model.config.get_text_config()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    special = [("bos", tokenizer.bos_token), ("eos", tokenizer.eos_token), ("pad", tokenizer.pad_token)]
    names = ", ".join(f"{name} {token!r}" for name, token in special)
    template = "a chat template" if tokenizer.chat_template is not None else "no chat template"
    tried = "" if run.layout.name == "padded" else " (the run will try it on the model first)"
    vocab = model.get_output_embeddings().weight.shape[0]
    return [
        f"model: {type(model).__name__}, {getattr(text, 'num_hidden_layers', '?')} layers, "
        f"H = {model.get_output_embeddings().weight.shape[1]:,}, V = {vocab:,}, {'tied' if tied else 'untied'} head",
        f"tokenizer: {len(tokenizer):,} tokens, {names}, {template}",
        f"loss: {run.spec.name}, beta {run.config.beta:g}; learning rate {run.learning_rate:g}, {run.config.schedule}; "
        f"{run.config.precision}; layout {run.layout.name}{tried}",
    ]


def _reference_line(run: Run) -> str:
    if not run.spec.needs_reference:
        return f"reference: loss {run.spec.name} needs none"
    used = len(run.plan.used(run.steps)) + len(run.eval_pairs)
    if run.pairs[0].ref_chosen_logp is not None:
        return "reference: log-probs are taken from the dataset's columns"
    return f"reference: up to {used:,} pairs are scored once before the first step, unless they are cached"


def _print_memory(run: Run, report: DryRun, whose: str) -> None:
    memory = report.memory
    pairs, positions, scored = memory.micro_batch
    unit = size_text

    def known(count: int | None) -> str:
        return "?" if count is None else unit(count)

    both = [
        ("parameters", *2 * (unit(memory.parameters),)),
        ("gradients", *2 * (unit(memory.gradients),)),
        ("AdamW's state", *2 * (unit(memory.optimizer),)),
        ("activations", known(memory.kept), known(memory.kept_checkpointed)),
        ("log-probs", *2 * (unit(memory.head + memory.head_gradient),)),
        ("peak", *(known(memory.total(checkpointing=value)) for value in (False, True))),
    ]
    header = ("", "plain", "gradient_checkpointing")
    title = (
        f"memory of a process, estimated: {memory.trained:,} parameters are trained, {memory.frozen:,} frozen\n"
        f"at its largest micro-batch: {pairs:,} pairs, {positions:,} positions, {scored:,} scored"
    )
    print_table(title, header, both, words=WORDS)
    if memory.why_unknown is not None:
        print(f"activations are not known: the forward does not run on shapes alone ({memory.why_unknown})")
    built = "not built" if run.config.logps == "linear" else "built, with their gradient"
    print(f"log-probs: {memory.head_plan}")
    print(f"logits of all positions would be {unit(memory.logits)} ({built})")
    print(f"available: {unit(report.available)} ({whose})")
    if report.fits is None:
        return
    as_set = "gradient_checkpointing" if memory.checkpointing else "plain"
    if report.fits:
        print(f"the peak ({as_set}, as the options say) fits")
        return
    print(f"THE PEAK ({as_set}, as the options say) DOES NOT FIT. {what_to_change(run, pairs=pairs)}")
    if not memory.checkpointing and (memory.total(checkpointing=True) or math.inf) <= report.available:
        print("with gradient_checkpointing it fits")


def show_pair(pair: Pair, tokenizer: Any, *, max_length: int, color: bool) -> list[str]:
    """A pair as the model sees it: token by token, the scored ones marked, so that a wrong template or border is seen.

    Lines of text; with `color` they hold ANSI codes.
    """
    lines = [f"the first pair (row {pair.row}), as the model sees it: {LEGEND[color]}"]
    names = ("chosen", "rejected") if pair.desirable is None else ("response", "mismatched response")
    for name, response in zip(names, (pair.chosen, pair.rejected), strict=True):
        whole, scored = len(response.ids), len(response.ids) - max(response.start, 1)
        cut = f", at max_length={max_length}" if whole == max_length else ""
        lines += [f"{name}: {whole} tokens, {scored} scored{cut}", _marked(response, tokenizer, color=color)]
    return lines


def _marked(response: Response, tokenizer: Any, *, color: bool) -> str:
    # The first token of a sequence is predicted by nothing: it is not scored.
    start = max(response.start, 1)
    prompt = _elided(pieces(tokenizer, response.ids[:start].tolist()), *PROMPT)
    answer = _elided(pieces(tokenizer, response.ids[start:].tolist()), *RESPONSE)
    if color:
        border = f"\x1b[90m{BORDER}\x1b[39m"
        return border.join([*prompt, *(f"\x1b[32m{text}\x1b[39m" for text in answer)])
    return f"{BORDER.join(prompt)}{OPEN}{BORDER.join(answer)}{CLOSE}"


def _elided(pieces: Sequence[str], first: int, last: int) -> list[str]:
    hidden = len(pieces) - first - last
    if hidden <= 1:
        return list(pieces)
    return [*pieces[:first], f" ... {hidden} tokens ... ", *pieces[-last:]]


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; a character of several tokens stands at its first, and CONTINUED at the others."""
    found: list[str] = []
    while len(found) < len(tokens):
        rest = tokens[len(found) : len(found) + CHARACTER]
        whole = next((n for n in range(1, len(rest) + 1) if BROKEN not in _decoded(tokenizer, rest[:n])), 1)
        if whole == 1:
            found.append(piece(tokenizer, rest[0]))
        else:
            found += [_decoded(tokenizer, rest[:whole]), *[CONTINUED] * (whole - 1)]
    return found


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def piece(tokenizer: Any, token: int) -> str:
    """A token's text on one line, spaces and special tokens included; a part of a character by its raw name."""
    raw = str(tokenizer.convert_ids_to_tokens(token))
    # SentencePiece's space is one that decoding a single token would take away.
    text = raw.replace("▁", " ") if "▁" in raw else _decoded(tokenizer, [token])
    if not text or BROKEN in text:
        text = f"<{raw}>"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
