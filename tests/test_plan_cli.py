"""`fastpref plan`: its formulas against measured memory, its plans against those that are made, and its options."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import linear_preference_loss, linear_sequence_logps, memory
from fastpref.cli import main
from fastpref.linear import peaks, preference, tokens
from fastpref.linear.explain import CALLERS, candidates, explain
from fastpref.linear.peaks import USES, Step, Use
from fastpref.linear.plan import Plan, minimum_budget, plan_preference, plan_tokens

GIB = 2**30
STEP = Step(pairs=3, length=1021, share=0.4, hidden_size=1536, vocab=50257, dtype=torch.bfloat16)
SIZES = ["--hidden_size=1536", "--vocab_size=50257"]

# Peak memory of the three ways beyond hidden states and gradients, after a small call has loaded the code. It is the
# larger of two measures, each of which may be too small. The profiler's count of torch's allocations is the same in
# every process, and knows nothing of what oneDNN copies. The growth of the resident set's high-water mark, in a process
# whose C library gives every block back at once, has that too, but in some processes misses a block (2.5 of 9.4 MB).
MEASURE = """
import ctypes, gc, itertools, json, sys

libc = ctypes.CDLL(None)
for parameter in (-3, -1):  # mmap and trim thresholds
    if libc.mallopt(parameter, 65536) != 1:
        sys.exit("mallopt failed")
import torch
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
import fastpref
from fastpref import memory

torch.set_num_threads(1)

def logits(hidden, weight, softcap):
    x = linear(hidden, weight)
    return softcap * torch.tanh(x / softcap) if softcap else x

def token_logps(x, targets):
    return x.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

def plain(hidden, weight, labels, softcap):
    targets = labels[:, 1:]
    values = token_logps(logits(hidden, weight, softcap)[:, :-1], targets.clamp(min=0))
    return values.where(targets != -100, 0.0).sum()

def block(rows, weight, targets, softcap):
    return token_logps(logits(rows, weight, softcap), targets)

def chunked(hidden, weight, labels, softcap):
    targets = labels[:, 1:]
    scored = targets != -100
    pairs = zip(hidden[:, :-1][scored].split(256), targets[scored].split(256))
    return sum(checkpoint(block, rows, weight, y, softcap, use_reentrant=False).sum() for rows, y in pairs)

def sequence_logps(hidden, weight, labels, softcap):
    return fastpref.sequence_logps(logits(hidden, weight, softcap), labels).sum()

def prepare(length, scored, hidden_size, vocab, dtype):
    labels = torch.full((2, length), -100)
    labels[:, -scored:] = torch.randint(vocab, (2, scored))
    return torch.randn(2, length, hidden_size).to(dtype), torch.randn(vocab, hidden_size).to(dtype), labels

def call(way, use, inputs, softcap):
    hidden, weight, labels = inputs
    with torch.set_grad_enabled(use != "forward"):
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(use == "trainable")]
        value = way(*leaves, labels, 30.0 if softcap else None)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return () if use == "forward" else torch.autograd.grad(value, wanted)

def peak(way, use, *sizes, softcap):
    call(way, use, prepare(300, 299, 32, 64, sizes[-1]), softcap)
    inputs = prepare(*sizes)
    gc.collect()
    assert memory.reset_peak()
    before = memory.resident()
    gradients = call(way, use, inputs, softcap)
    grown = memory.peak() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call(way, use, inputs, softcap)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    return max(grown, *held) - sum(x.nbytes for x in gradients)

found = []
for way, use, *sizes, dtype, softcap in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    found.append(peak(globals()[way], use, *sizes, getattr(torch, dtype), softcap=softcap))
print(json.dumps(found))
"""

# way, use, T, scored positions of a sequence, H, V, dtype, softcap; one pair
WHOLE, BLOCKS, HEAVY = (509, 460, 32, 4001), (331, 301, 64, 6007), (331, 301, 1024, 1009)
MEASURED: list[tuple[str, Use, int, int, int, int, str, bool]] = [
    ("plain", "forward", *WHOLE, "float32", False),
    ("plain", "frozen", *WHOLE, "float32", False),
    ("plain", "trainable", *WHOLE, "float32", False),
    ("plain", "frozen", *WHOLE, "float32", True),
    ("plain", "forward", *WHOLE, "bfloat16", False),
    ("plain", "trainable", *WHOLE, "bfloat16", True),
    ("chunked", "forward", *BLOCKS, "float32", False),
    ("chunked", "frozen", *BLOCKS, "float32", False),
    ("chunked", "trainable", *BLOCKS, "float32", True),
    ("chunked", "trainable", *HEAVY, "float32", False),  # a block's dW is larger than its logits
    ("chunked", "trainable", *BLOCKS, "bfloat16", False),
    ("chunked", "trainable", *HEAVY, "bfloat16", False),
    ("chunked", "trainable", 131, 121, 64, 9001, "float32", False),  # a single block
    ("sequence_logps", "forward", *WHOLE, "float32", False),
    ("sequence_logps", "trainable", *WHOLE, "float32", False),
    ("sequence_logps", "frozen", *WHOLE, "float32", True),
    ("sequence_logps", "forward", *WHOLE, "bfloat16", False),
]
FORMULAS = {"plain": peaks.plain_peak, "chunked": peaks.chunked_peak, "sequence_logps": peaks.logits_peak}


@pytest.fixture(scope="module")
def measured() -> list[int]:
    if not memory.reset_peak():
        pytest.skip("the system keeps no peak of resident memory that can be reset")
    command = [sys.executable, "-c", MEASURE, json.dumps(MEASURED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.numeric
@pytest.mark.parametrize("place", range(len(MEASURED)), ids=["-".join(map(str, case)) for case in MEASURED])
def test_a_measured_peak_is_within_15_percent_of_its_bounds(
    place: int, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    way, use, length, scored, hidden_size, vocab, dtype, softcap = MEASURED[place]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as where it was measured
    step = Step(
        pairs=1, length=length, share=scored / length, hidden_size=hidden_size, vocab=vocab,
        dtype=getattr(torch, dtype), softcap=softcap,
    )  # fmt: skip
    assert step.rows == 2 * scored
    lower, upper = FORMULAS[way](step, use, copies=False), FORMULAS[way](step, use)
    assert 0.85 * lower <= measured[place] <= 1.15 * upper
    if dtype == "float32":  # nothing depends on the processor
        assert lower == upper


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
@pytest.mark.parametrize("budget", [80_000, 2_000_000, 2**30])
def test_the_plan_shown_is_the_plan_made(budget: int, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(
        pairs=1, length=23, share=0.6, hidden_size=17, vocab=507, dtype=torch.float32, streams=loss == "sigmoid"
    )
    made: list[Plan] = []

    def record(planner: Callable[..., Plan]) -> Callable[..., Plan]:
        def planned(*args: Any, **options: Any) -> Plan:
            made.append(planner(*args, **options))
            return made[-1]

        return planned

    monkeypatch.setattr(tokens, "plan_tokens", record(plan_tokens))
    monkeypatch.setattr(preference, "plan_preference", record(plan_preference))
    torch.manual_seed(0)
    labels = torch.full((2, step.length), -100)
    labels[:, -step.scored :] = torch.randint(step.vocab, (2, step.scored))
    for use in USES:
        hidden = torch.randn(2, step.length, step.hidden_size, requires_grad=use != "forward")
        weight = torch.randn(step.vocab, step.hidden_size, requires_grad=use == "trainable")
        linear_sequence_logps(hidden, weight, labels, memory_budget=budget)
        reference = torch.zeros(2) if loss == "sigmoid" else None
        if use == "trainable":
            linear_preference_loss(hidden, weight, labels, reference, loss=loss, memory_budget=budget)
    shown = [p for report in explain(step, budget) for p in report.paths if p.plan is not None]
    assert [plan.describe for plan in made] == [path.plan for path in shown]
    assert [plan.products for plan in made] == [path.products for path in shown]
    assert [plan.peak for plan in made] == [path.peak_bytes for path in shown]


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("memory", [GIB, 3 * GIB, 80 * GIB])
def test_the_longest_sequence_fits_and_one_token_more_does_not(memory: int, gpu: bool) -> None:
    step = replace(STEP, gpu=gpu)
    budget = 64 * 2**20
    for report in explain(step, budget, memory):
        for path in report.paths:
            assert path.longest is not None
            assert path.longest > 2
            fits = []
            for length in (path.longest, path.longest + 1):
                at = replace(step, length=length)
                left = memory - at.held_bytes(report.use)
                if path.name in FORMULAS:
                    fits.append(FORMULAS[path.name](at, report.use) <= left)
                else:
                    fits.append(minimum_budget(at.problem(report.use), at.machine) <= min(left, budget))
            assert fits == [True, False], (report.use, path)


def test_the_longest_sequence_is_planned_with_what_is_left_of_the_memory() -> None:
    memory, budget = 3 * GIB, 64 * 2**20
    for report in explain(STEP, budget, memory):
        for path in report.paths[len(FORMULAS) :]:
            at = replace(STEP, length=path.longest or 0)
            assert path.longest_budget == min(budget, memory - at.held_bytes(report.use))
            make = plan_preference if path.name == "linear_preference_loss" else plan_tokens
            assert make(at.problem(report.use), at.machine, path.longest_budget).describe == path.longest_plan


def test_no_sequence_fits_where_the_heads_gradient_alone_does_not() -> None:
    head = STEP.vocab * STEP.hidden_size * 2
    forward, frozen, trainable = explain(STEP, GIB, head)
    assert [path.longest for path in trainable.paths] == [0] * 5
    assert all(path.longest for path in (*forward.paths, *frozen.paths))


def test_a_plans_least_budget_makes_it_and_a_byte_less_does_not() -> None:
    problem, machine = STEP.problem("trainable"), STEP.machine
    found = candidates(STEP, GIB)
    assert [plan.name for plan in found] == ["keep", "recompute", "two-pass", "stream"]
    for plan in found:
        assert plan_preference(problem, machine, plan.least_budget, force=plan.name).name == plan.name
        try:
            other = plan_preference(problem, machine, plan.least_budget - 1, force=plan.name).name
        except ValueError:
            continue
        assert other != plan.name


def least_budgets() -> dict[str, int]:
    """Of each plan of STEP, "mixed" included."""
    return {plan.name: plan.least_budget for plan in candidates(STEP, between(STEP))}


def between(step: Step) -> int:
    """A budget that keeps some of the tiles."""
    keep = next(plan.least_budget for plan in candidates(step, GIB) if plan.name == "keep")
    return int(0.7 * keep)


def test_candidates_that_do_not_fit_have_no_cost_and_the_chosen_one_is_named() -> None:
    budget = between(STEP)
    found = {plan.name: plan for plan in candidates(STEP, budget)}
    assert found["keep"].cost is found["keep"].peak_bytes is found["stream"].cost is None
    assert found["keep"].least_budget > budget
    assert found["mixed"].chosen_by == CALLERS
    assert found["recompute"].chosen_by == ()
    assert found["recompute"].cost == 4.0
    assert found["mixed"].cost is not None
    assert 3.0 < found["mixed"].cost < 4.0
    assert "stream" not in {plan.name for plan in candidates(replace(STEP, streams=False), budget)}


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("keep", "writing and reading all tiles costs {traffic:.2f} products and saves 1, and all fit the budget"),
        ("mixed", "; the budget holds {kept} of {slices} slices, the others are computed again"),
        ("recompute", "but the budget does not hold a single slice"),
        ("two-pass", "the budget has no room for dh in float32"),
    ],
)
def test_the_reason_names_the_numbers_that_decide(plan: str, why: str) -> None:
    budget = between(STEP) if plan == "mixed" else least_budgets()[plan]
    path = explain(STEP, budget)[-1].paths[len(FORMULAS)]
    made = plan_tokens(STEP.problem("trainable"), STEP.machine, budget)
    assert (path.name, path.plan, made.name) == ("linear_sequence_logps", made.describe, plan)
    traffic = 2 * STEP.dtype.itemsize * STEP.machine.balance / (2 * STEP.hidden_size)
    assert why.format(traffic=traffic, kept=made.kept, slices=made.slices) in str(path.why)


def test_nothing_is_kept_where_traffic_costs_more_than_the_product_that_it_saves() -> None:
    step = replace(STEP, hidden_size=int(STEP.machine.balance))
    path = explain(step, GIB)[-1].paths[len(FORMULAS)]
    assert str(path.plan).startswith("recompute: 4.00 products")
    assert path.why == "writing and reading all tiles costs 2.00 products and saves 1: nothing is kept"


def test_a_long_pair_streams_where_its_accumulator_fits_and_the_reason_compares_costs() -> None:
    step = replace(STEP, pairs=1, length=65536, share=0.9)
    shown = {path.name: path for path in explain(step, GIB)[-1].paths}
    linear, loss = shown["linear_sequence_logps"], shown["linear_preference_loss"]
    assert str(loss.plan).startswith("stream: 3.00 products")
    assert linear.products > 3.5
    assert f"products with its traffic, {str(linear.plan).partition(':')[0]} " in str(loss.why)
    general = explain(replace(step, streams=False), GIB)[-1].paths[-1]
    assert (general.name, general.plan) == ("linear_preference_loss", linear.plan)
    assert str(general.why).endswith("a loss of more than one argument cannot stream")
    short = explain(replace(step, length=64), GIB)[-1].paths[-1]
    assert "products with its traffic, stream " in str(short.why)


def run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["plan", *options]) == 0
    return capsys.readouterr().out


def test_json_holds_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--max_length=1021",
        "--pairs=3",
        "--scored=0.4",
        "--device=cpu",
        "--memory=3GiB",
        "--memory_budget=1GiB",
    ]
    got = json.loads(run(capsys, *SIZES, *options, "--json"))
    reports = explain(STEP, GIB, 3 * GIB)
    assert got["uses"] == json.loads(json.dumps([asdict(report) for report in reports]))
    assert got["plans"] == json.loads(json.dumps([asdict(plan) for plan in candidates(STEP, GIB)]))
    assert (got["memory"], got["memory_budget"], got["loss"]) == (3 * GIB, GIB, "sigmoid")
    assert got["head"]["rows"] == 6 * 408
    assert got["head"]["product_operations"] == 2 * 6 * 408 * 1536 * 50257


def test_the_text_has_every_path_and_plan_and_is_the_same_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SIZES, "--max_length=1021", "--pairs=3", "--scored=0.4", "--device=cpu", "--memory=3GiB"]
    with_rich = run(capsys, *options) if importlib.util.find_spec("rich") is not None else None
    monkeypatch.setattr("fastpref.tables.find_spec", lambda name: None)
    printed = run(capsys, *options)
    assert printed.startswith("head: N = 2,448 scored of 6,126 positions (pairs = 3, T = 1,021), H = 1,536, ")
    assert "one product: 0.378 TFLOP; memory_budget: 1.00 GiB\n" in printed
    for report in explain(STEP, GIB, 3 * GIB):
        for path in report.paths:
            rows = [line.split() for line in printed.splitlines() if line.startswith(f"{path.name} ")]
            assert [f"{path.longest:,}"] in [row[-1:] for row in rows]
            assert path.plan is None or (path.plan in printed and f"  why: {path.why}" in printed)
    if with_rich is not None:
        assert [line.split() for line in with_rich.splitlines()] == [line.split() for line in printed.splitlines()]


def test_without_memory_there_is_no_longest_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, *SIZES)
    assert "longest in" not in printed
    assert "--memory SIZE" in printed
    assert json.loads(run(capsys, *SIZES, "--json"))["uses"][0]["paths"][0]["longest"] is None


def test_a_loss_decides_whether_pairs_may_stream(capsys: pytest.CaptureFixture[str]) -> None:
    for loss, streams in (("dpo", True), ("ipo", True), ("simpo", False), ("aot", False)):
        got = json.loads(run(capsys, *SIZES, f"--loss={loss}", "--json"))
        assert got["head"]["streams"] is streams
        assert ("stream" in {plan["name"] for plan in got["plans"]}) is streams


def model_folder(folder: Path, config: dict[str, Any] | str) -> str:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return f"--model={folder}"


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"model_type": "gpt2", "n_embd": 48, "n_head": 2, "vocab_size": 507}, (48, 507, False)),
        ({"model_type": "gemma2", "hidden_size": 64, "vocab_size": 99}, (64, 99, True)),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 64, "vocab_size": 99}}, (64, 99, False)),
        ({"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 32, "vocab_size": 99}, (32, 99, False)),
    ],
    ids=["gpt2", "softcap", "nested", "projected"],
)
def test_the_heads_sizes_are_read_from_a_config(
    config: dict[str, Any], head: tuple[int, int, bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="the [train] extra is not installed")
    got = json.loads(run(capsys, model_folder(tmp_path, config), "--json"))["head"]
    assert (got["hidden_size"], got["vocab"], got["softcap"]) == head


BAD = {
    "no head": ([], "give --model, or both --hidden_size and --vocab_size"),
    "half a head": (["--hidden_size=8"], "give --model, or both --hidden_size and --vocab_size"),
    "two heads": (["--model=x", *SIZES], "give --model, or --hidden_size and --vocab_size, not both"),
    "no model": (["--model=./nowhere"], "there is no folder './nowhere', and no model of that name in the local cache"),
    "no positive size": (
        ["--hidden_size=0", "--vocab_size=9"],
        "must be a whole number in [1, 1099511627776], got '0'",
    ),
    "short": (
        [*SIZES, "--max_length=1"],
        "argument --max_length: must be a whole number in [2, 1099511627776], got '1'",
    ),
    "long": ([*SIZES, "--max_length=" + "9" * 400], "argument --max_length: must be a whole number in [2, "),
    "much": (
        [*SIZES, "--memory=" + "9" * 30],
        "argument --memory: must be at most 1152921504606846976 bytes, got '999",
    ),
    "endless": ([*SIZES, "--memory=" + "9" * 400 + "GiB"], "argument --memory: "),
    "share 0": ([*SIZES, "--scored=0"], "argument --scored: must be a number in (0, 1], got '0'"),
    "share 1.5": ([*SIZES, "--scored=1.5"], "argument --scored: must be a number in (0, 1], got '1.5'"),
    "share nan": ([*SIZES, "--scored=nan"], "argument --scored: must be a number in (0, 1], got 'nan'"),
    "memory": ([*SIZES, "--memory=80 gigs"], 'argument --memory: must be bytes or text like "512MiB"'),
    "no memory": ([*SIZES, "--memory=0"], "argument --memory: must be positive, got 0"),
    "small budget": ([*SIZES, "--memory_budget=4KiB"], "memory_budget of 4096 bytes is smaller than one tile"),
    "dtype": ([*SIZES, "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
    "loss": ([*SIZES, "--loss=dop"], "loss must be one of "),
    "unknown": ([*SIZES, "--pair=3"], "unrecognized arguments: --pair=3; did you mean '--pairs'?"),
}


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line on stderr of options that do not fit."""
    assert main(["plan", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastpref plan: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("case", BAD)
def test_bad_options_give_one_line_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = BAD[case]
    if case == "no model":
        pytest.importorskip("transformers", reason="the [train] extra is not installed")
    assert message in error_of(capsys, *options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit"}, "must have a positive vocab_size, got None"),
        ({"model_type": "llama", "vocab_size": "many"}, "expected int, got str"),
        ({"model_type": "t5"}, "is an encoder-decoder model"),
        ({"model_type": "of-tomorrow"}, "of-tomorrow"),
        ({"vocab_size": 9, "hidden_size": 8}, "model_type"),
        ("{", "config.json' is not a valid JSON file"),
    ],
    ids=["no vocabulary", "wrong type", "encoder-decoder", "unknown type", "no type", "no JSON"],
)
def test_a_config_without_a_usable_head_gives_one_line(
    config: dict[str, Any] | str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="the [train] extra is not installed")
    assert message in error_of(capsys, model_folder(tmp_path, config))


def test_a_folder_without_a_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{str(tmp_path)!r} is not a folder with a config.json" in error_of(capsys, f"--model={tmp_path}")


def test_sizes_by_hand_need_no_transformers_and_a_model_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    run(capsys, *SIZES)
    error = error_of(capsys, model_folder(tmp_path, {"model_type": "gpt2"}))
    assert 'pip install "fastpref[train]"; --hidden_size and --vocab_size take its place' in error


def test_the_defaults_are_those_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="the [train] extra is not installed")
    from fastpref.training.config import MAX_LENGTH, TrainConfig

    defaults = {field.name: field.default for field in fields(TrainConfig)}
    got = json.loads(run(capsys, *SIZES, "--json"))
    assert (got["head"]["pairs"], got["head"]["length"]) == (defaults["batch_size"], MAX_LENGTH)
    assert got["loss"] == defaults["loss"]
