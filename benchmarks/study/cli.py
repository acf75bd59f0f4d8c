"""`fastpref study`: its options, which are checked before torch and transformers are imported."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastpref.benchmarks.arguments import fail
from fastpref.benchmarks.study.pairs import SETS, check_university
from fastpref.benchmarks.study.settings import METHODS, SIZES, TUNING_SEED, Study
from fastpref.console import Console
from fastpref.demo.cli import LARGEST_SEED
from fastpref.demo.pairs import DEFAULT_UNIVERSITY
from fastpref.folders import FolderError, check
from fastpref.options import Parser, UsageError, given_path

Finish = Callable[[dict[str, Any]], dict[str, Any]]
TRL_METHODS = ("trl", "trl_matched")


def main(arguments: Sequence[str]) -> int:
    """Run the study; 0 done, 1 a part failed, 2 after one line on stderr where an option does not fit."""
    console = Console(main=True, progress=True, out=sys.stdout)  # this one, be it redirected while TRL's trainer prints
    try:
        options = _parser().parse_args(list(arguments))
        if options.report is not None:
            _nothing_else(options)
            return _report(options.report, console)
        methods = _methods(options.methods, console)
        seeds = SIZES[options.size].seeds if options.seeds is None else options.seeds
        study = Study(
            size=dataclasses.replace(SIZES[options.size], seeds=seeds),
            university=check_university(options.university),
            folder=options.output_dir,
            model=_model(options.model),
        )
        check(study.folder, study.owner)
        _check_positions(study)
        finish = _judge(options.judge_url, options.judge_model, study.folder, console)
    except (ValueError, OSError, ImportError) as error:
        return fail("fastpref study", error)
    return _run(study, methods, options.workers, console, finish)


def _run(study: Study, methods: Sequence[str], workers: int | None, console: Console, finish: Finish | None) -> int:
    import torch

    from fastpref.benchmarks.study.endpoint import JudgeError
    from fastpref.benchmarks.study.pool import JobError, cores
    from fastpref.benchmarks.study.run import run_study

    workers = workers or (1 if torch.cuda.is_available() else cores())
    # Before the workers start, which read it as they import torch.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))
    try:
        run_study(study, methods=methods, workers=workers, console=console, finish=finish)
    except (JobError, JudgeError, OSError) as error:
        fail("fastpref study", error)
        return 2 if isinstance(error, FolderError) else 1
    except KeyboardInterrupt:
        print("fastpref study: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="fastpref study",
        description="Align one base model by DPO, DPOP, SFT, KL-SFT and TRL's trainer, each swept a little, over three "
        "seeds and two sets of pairs, and write a report that holds them against what was reported. Nothing is "
        "downloaded. A study that was interrupted goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="small: on two CPU cores within 45 minutes; 124m: GPT-2's own shape, for a GPU; tiny: the path alone, "
        "which proves nothing (default: %(default)s)",
    )
    parser.add_argument("--model", help="folder or hub name of a base to start from, such as GPT-2's real weights")
    parser.add_argument("--seeds", type=_seeds, help="as 0,1,2 (the default, but for tiny)")
    parser.add_argument("--methods", help=f"some of {','.join(METHODS)} (default: all that can run)")
    parser.add_argument("--university", default=DEFAULT_UNIVERSITY, help="the target (default: %(default)s)")
    parser.add_argument(
        "--output_dir",
        type=given_path,
        default=Path("fastpref-study"),
        help="folder of the study (default: %(default)s)",
    )
    parser.add_argument("--workers", type=_workers, help="processes (default: one a core; one where there is a GPU)")
    parser.add_argument("--judge_url", help="an OpenAI-compatible endpoint that judges too; key in OPENAI_API_KEY")
    parser.add_argument("--judge_model", help="the model that judges at --judge_url")
    parser.add_argument(
        "--report", type=given_path, metavar="FOLDER", help="only write the report anew, from FOLDER/results.json"
    )
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {text!r}") from None
    if len(set(seeds)) != len(seeds) or not all(0 <= seed <= LARGEST_SEED for seed in seeds) or TUNING_SEED in seeds:
        raise argparse.ArgumentTypeError(
            f"must be different, between 0 and {LARGEST_SEED}, and not {TUNING_SEED} (the tuning seed), got {text!r}"
        )
    return seeds


def _workers(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1024, got {text!r}")
    return int(text)


def _methods(text: str | None, console: Console) -> tuple[str, ...]:
    given = METHODS if text is None else tuple(part.strip() for part in text.split(","))
    unknown = [name for name in given if name not in METHODS]
    if unknown or len(set(given)) != len(given):
        raise UsageError(f"--methods takes each of {', '.join(METHODS)} at most once, got {text!r}")
    if "trl_matched" in given and "dpo" not in given:
        raise UsageError("trl_matched runs with the settings that dpo takes: name dpo in --methods too")
    wanted = [name for name in given if name in TRL_METHODS]
    if wanted and find_spec("trl") is None:
        if text is not None:
            raise ImportError(f'{", ".join(wanted)} need TRL, which is not installed: pip install "fastpref[trl]"')
        console.say('TRL is not installed, so its runs are left out: pip install "fastpref[trl]"')
        given = tuple(name for name in given if name not in TRL_METHODS)
    return tuple(name for name in METHODS if name in given)


def _model(name: str | None) -> str | None:
    """The base that was asked for, as an absolute path where it is a folder: jobs run in other processes."""
    if name is None:
        return None
    if not name.strip():
        raise UsageError("--model must be a folder or a hub name, got an empty one")
    path = Path(name).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise UsageError(f"--model {name!r} holds no config.json: give the folder of a transformers model")
    return str(path.resolve()) if path.exists() else name


def _check_positions(study: Study) -> None:
    """Raise where there is no such model, or its positions do not hold a prompt and an answer.

    Before anything is spent: the judge is trained before the model is loaded.
    """
    if study.model is None:
        return
    from transformers import AutoConfig, AutoTokenizer

    positions = getattr(AutoConfig.from_pretrained(study.model), "max_position_embeddings", None)
    tokenizer = AutoTokenizer.from_pretrained(study.model)
    prompts = [pair["prompt"] for pair in study.pairs(TUNING_SEED)[SETS[0]].heldout]
    longest, answer = max(map(len, tokenizer(prompts)["input_ids"])), study.size.max_new_tokens
    if positions is None or positions < longest + answer:
        has = "a config without max_position_embeddings" if positions is None else f"{positions} positions"
        raise UsageError(
            f"--model {study.model!r} has {has}, but a prompt of {longest} of its tokens and an answer of {answer} "
            f"need {longest + answer}: give a model with as many, such as GPT-2 with 1024"
        )


def _judge(url: str | None, model: str | None, folder: Path, console: Console) -> Finish | None:
    """What asks the endpoint when the results are there; whatever can be wrong before the first request is raised."""
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise UsageError("--judge_url and --judge_model go together: give both, or neither")
    from fastpref.benchmarks.study.endpoint import Endpoint, JudgeError, check_ready
    from fastpref.benchmarks.study.judging import judge_results

    endpoint = Endpoint(url, model)
    try:
        check_ready()
    except JudgeError as error:
        raise UsageError(str(error)) from None
    return lambda results: judge_results(results, endpoint, folder, console)


def _nothing_else(options: argparse.Namespace) -> None:
    """--report does not run anything, so that the options of a run would be ignored."""
    parser = _parser()
    given = [f"--{name}" for name, value in vars(options).items() if value != parser.get_default(name)]
    if len(given) > 1:
        raise UsageError(f"--report takes no other option, got {', '.join(sorted(set(given) - {'--report'}))}")


def _report(folder: Path, console: Console) -> int:
    from jinja2 import UndefinedError

    from fastpref.benchmarks.study.report import print_summary, write_report
    from fastpref.benchmarks.study.run import FORMAT, RESULTS

    path = folder / RESULTS
    if not path.is_file():
        raise UsageError(f"there is no {path}: --report takes the folder of a study that has ended")
    anew = "the study's own command writes it anew from what is done"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): {anew}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        there = results.get("format") if isinstance(results, dict) else None
        raise UsageError(f"{path} has format {there!r}, and this version reads {FORMAT}: {anew}")
    try:
        page = write_report(results, folder)
    except (KeyError, UndefinedError) as error:
        raise UsageError(f"{path} lacks a part of the page ({error}): {anew}") from error
    print_summary(results)
    console.say(f"the report is {page}")
    return 0
