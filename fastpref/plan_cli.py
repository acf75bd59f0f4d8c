"""`fastpref plan`: what the head of a model will need, by which plan, and the longest sequence that fits.

It needs torch alone; transformers only to read a model's config, rich only for prettier tables. `--help` needs none of
them: what imports torch is imported by the functions that compute.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.checks import parse_budget
from fastpref.options import Parser, UsageError, whole
from fastpref.tables import print_table, size_text

if TYPE_CHECKING:
    from fastpref.linear.explain import Candidate, UseReport
    from fastpref.linear.peaks import Step

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # by their names in torch
TITLES = {
    "forward": "forward only: reference and evaluation",
    "frozen": "frozen head: LoRA, PEFT",
    "trainable": "trainable head",
}
# Beyond any machine, and far enough from where floats end.
LARGEST_COUNT, LARGEST_MEMORY = 2**40, 2**60
NAMES = ("path", "plan", "chosen by")  # columns of words, the others are numbers
NOTES = (
    "plain: float32 log_softmax of all logits; chunked: blocks of {chunk} scored tokens, recomputed in backward; "
    "sequence_logps: fastpref on all logits; linear_*: fastpref on hidden states (fastpref train takes "
    "linear_sequence_logps). Products are counted in 2·N·H·V operations; the peak is what comes beyond hidden states "
    "and gradients."
)


def _bytes(text: str) -> int:
    try:
        count = parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory_budget ")) from None
    if count > LARGEST_MEMORY:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST_MEMORY} bytes, got {text!r}")
    return count


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], got {text!r}")
    return share


def _parser() -> Parser:
    parser = Parser(
        prog="fastpref plan",
        description="Print what the head of a model needs in a preference step: peak memory and products of the usual "
        "ways and of fastpref, the plan that fastpref makes and why, and the longest sequence that fits.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help="folder with a transformers config.json, or a hub name in the local cache")
    add("--hidden_size", type=whole(1, LARGEST_COUNT), help="H, instead of --model")
    add("--vocab_size", type=whole(1, LARGEST_COUNT), help="V, instead of --model")
    add("--bias", action="store_true", help="the head has a bias")
    add("--max_length", type=whole(2, LARGEST_COUNT), default=1024, help="tokens a sequence (default: %(default)s)")
    add("--pairs", type=whole(1, LARGEST_COUNT), default=4, help="pairs in a micro-batch (default: %(default)s)")
    add("--scored", type=_share, default=0.5, help="share of positions that are scored (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bf16", help="of hidden states and head (default: %(default)s)")
    add("--loss", default="sigmoid", help="a loss by name; those of one argument may stream (default: %(default)s)")
    add("--device", choices=("cpu", "gpu"), help="default: the GPU where there is one")
    add(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help="what is free after weights, optimiser and backbone, as 80GiB: what hidden states, their gradient, the "
        "head's gradient and the rest may take together. Gives the longest sequence that fits",
    )
    add(
        "--memory_budget",
        type=_bytes,
        metavar="SIZE",
        default=parse_budget(None),
        help="fastpref's own, as 512MiB (default: 1GiB)",
    )
    add("--json", action="store_true", help="print the same as JSON, in bytes")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the plan; 0, or 2 after one line on stderr where an option does not fit."""
    try:
        options = _parser().parse_args(argv)
        from fastpref.linear.explain import candidates, explain

        step = _step(options)
        reports = explain(step, options.memory_budget, options.memory)
        plans = candidates(step, options.memory_budget)
    except (ValueError, OSError, ImportError) as error:
        print(f"fastpref plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(_as_json(step, options, reports, plans), indent=2))
    else:
        _print(step, options, reports, plans)
    return 0


def _step(options: argparse.Namespace) -> Step:
    import torch

    from fastpref.linear.peaks import Step
    from fastpref.losses import get_loss

    sizes = (options.hidden_size, options.vocab_size)
    if options.model is not None:
        if sizes != (None, None):
            raise UsageError("give --model, or --hidden_size and --vocab_size, not both")
        hidden_size, vocab, softcap = _read_head(options.model)
    else:
        if None in sizes:
            raise UsageError("give --model, or both --hidden_size and --vocab_size")
        hidden_size, vocab, softcap = *sizes, False
    return Step(
        pairs=options.pairs,
        length=options.max_length,
        share=options.scored,
        hidden_size=hidden_size,
        vocab=vocab,
        dtype=getattr(torch, DTYPES[options.dtype]),
        bias=options.bias,
        softcap=softcap,
        gpu=torch.cuda.is_available() if options.device is None else options.device == "gpu",
        streams=get_loss(options.loss).margin is not None,
    )


def _read_head(source: str) -> tuple[int, int, bool]:
    """H, V and whether there is a softcap, from a model's config. Nothing is downloaded."""
    from fastpref.models import SOFTCAPS

    by_hand = "--hidden_size and --vocab_size take its place"
    path = Path(source).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"--model: {source!r} is not a folder with a config.json; {by_hand}")
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError(
            f'reading a model\'s config needs transformers: pip install "fastpref[train]"; {by_hand}'
        ) from error
    try:
        whole = AutoConfig.from_pretrained(
            str(path) if path.exists() else source, local_files_only=True, trust_remote_code=False
        )
    except OSError as error:
        if path.exists():
            raise
        raise FileNotFoundError(
            f"--model: there is no folder {source!r}, and no model of that name in the local cache; {by_hand}"
        ) from error
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"--model: transformers cannot read {source!r}: {error}; {by_hand}") from error
    if getattr(whole, "is_encoder_decoder", False):
        raise ValueError(f"--model: {source!r} is an encoder-decoder model; fastpref takes decoder-only causal LMs")
    text = whole.get_text_config()
    vocab: Any = getattr(text, "vocab_size", None)
    # OPT's head takes what was projected back to the embeddings' size.
    hidden_size: Any = getattr(text, "word_embed_proj_dim", None) or getattr(text, "hidden_size", None)
    for name, value in (("vocab_size", vocab), ("hidden_size", hidden_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"--model: the config of {source!r} must have a positive {name}, got {value!r}; {by_hand}")
    return hidden_size, vocab, any(getattr(text, name, None) for name in SOFTCAPS)


def _as_json(
    step: Step, options: argparse.Namespace, reports: list[UseReport], plans: list[Candidate]
) -> dict[str, Any]:
    head = {**asdict(step), "dtype": options.dtype, "positions": step.positions, "rows": step.rows}
    return {
        "head": {**head, "product_operations": step.product},
        "loss": options.loss,
        "memory_budget": options.memory_budget,
        "memory": options.memory,
        "uses": [asdict(report) for report in reports],
        "plans": [asdict(plan) for plan in plans],
    }


def _print(step: Step, options: argparse.Namespace, reports: list[UseReport], plans: list[Candidate]) -> None:
    from fastpref.linear.peaks import CHUNK

    print(
        f"head: N = {step.rows:,} scored of {step.positions:,} positions (pairs = {step.pairs:,}, "
        f"T = {step.length:,}), H = {step.hidden_size:,}, V = {step.vocab:,}, {options.dtype}, {step.machine.name}"
    )
    print(f"one product: {step.product / 1e12:.3g} TFLOP; memory_budget: {size_text(options.memory_budget)}")
    for report in reports:
        _print_use(report, options.memory)
    rows = [
        (
            plan.name,
            "does not fit" if plan.cost is None else f"{plan.cost:.2f}",
            "" if plan.peak_bytes is None else size_text(plan.peak_bytes),
            size_text(plan.least_budget),
            ", ".join(plan.chosen_by),
        )
        for plan in plans
    ]
    header = ("plan", "cost in products", "peak", "least budget", "chosen by")
    title = "plans of a trainable head; the cost counts the traffic that a plan adds"
    print_table(title, header, rows, words=NAMES)
    print(f"\n{NOTES.format(chunk=CHUNK)}")
    if options.memory is None:
        print("--memory SIZE (what is free after weights, optimiser and backbone) adds the longest sequence that fits")


def _print_use(report: UseReport, memory: int | None) -> None:
    header = ["path", "products", "peak"]
    if memory is not None:
        header.append(f"longest in {size_text(memory)}")
    rows = []
    for path in report.paths:
        row = [path.name, f"{path.products:.2f}", size_text(path.peak_bytes)]
        if path.longest is not None:
            row.append(f"{path.longest:,}" if path.longest else "none")
        rows.append(row)
    title = f"{TITLES[report.use]}; hidden states and gradients take {size_text(report.held_bytes)}"
    print_table(title, header, rows, words=NAMES)
    for path in report.paths:
        if path.plan is not None:
            print(f"{path.name}: {path.plan}\n  why: {path.why}")
            if path.longest_plan is not None:
                print(f"  at the longest, with memory_budget={path.longest_budget} at most: {path.longest_plan}")
