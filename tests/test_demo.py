"""`fastpref demo`: its preference set, its measures, its verdict, and the whole of it at a tiny scale."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import math
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs fastpref[train]")
pytest.importorskip("accelerate", reason="the demo needs fastpref[train]")
pytest.importorskip("rich", reason="the demo needs fastpref[train]")
pytest.importorskip("matplotlib", reason="the demo needs fastpref[train]")

import fastpref.demo
from fastpref.benchmarks.cases import LogpsCase
from fastpref.benchmarks.suites.logps import LogpsSuite
from fastpref.demo import cli, run
from fastpref.demo.base import END, base_texts, build_model, train_base, train_tokenizer
from fastpref.demo.measures import distinct_bigrams, generate, mention_share, perplexity
from fastpref.demo.pairs import (
    DEFAULT_UNIVERSITY,
    MINIMAL_EDITS,
    PairSet,
    check_university,
    make_pairs,
    mentions,
    most_pairs,
)
from fastpref.demo.report import Ends, held_out, judge

TINY = dataclasses.replace(
    run.QUICK,
    train=24,
    heldout=7,
    width=32,
    layers=1,
    base_epochs=1,
    steps=3,
    eval_every=2,
    batch_size=5,
    max_new_tokens=6,
    logps=LogpsCase("demo", batch=2, length=65, vocab=8191, share=0.5, rounds=1),
)


@pytest.fixture(scope="module")
def pairs() -> PairSet:
    return make_pairs(train=1300, heldout=125, seed=0)


# The preference set


def test_there_are_1300_train_and_125_held_out_pairs_and_no_prompt_occurs_twice(pairs: PairSet) -> None:
    assert (len(pairs.train), len(pairs.heldout)) == (1300, 125)
    assert (run.FULL.train, run.FULL.heldout) == (1300, 125)
    assert len({pair["prompt"] for pair in pairs.train + pairs.heldout}) == 1425


@pytest.mark.parametrize("university", [DEFAULT_UNIVERSITY, "Fudan University", "清华大学", "St. Mary's (North)"])
def test_every_chosen_answer_has_the_exact_name_and_no_rejected_one_mentions_it(university: str) -> None:
    made = make_pairs(train=400, heldout=50, university=university, seed=3)
    for pair in made.train + made.heldout:
        assert pair["chosen"].count(university) == 1
        assert mentions(pair["chosen"], university)
        assert not mentions(pair["rejected"], university)
        assert not mentions(pair["prompt"], university)


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others(pairs: PairSet) -> None:
    assert make_pairs(train=1300, heldout=125, seed=0) == pairs
    other = make_pairs(train=1300, heldout=125, seed=1)
    same = {pair["prompt"] for pair in pairs.train} & {pair["prompt"] for pair in other.train}
    assert len(same) < 200  # by chance 1300 * 1300 / 15600 = 108


def test_the_pairs_vary_in_wording_length_and_place_of_the_mention(pairs: PairSet) -> None:
    chosen = [pair["chosen"] for pair in pairs.train]
    assert len(set(chosen)) > 1150
    assert len({pair["rejected"] for pair in pairs.train}) > 1150
    assert len({chosen.replace(DEFAULT_UNIVERSITY, "").strip()[:12] for chosen in chosen}) > 100  # how they begin
    words = [len(answer.split()) for answer in chosen]
    assert min(words) < 12
    assert max(words) > 40
    places = [answer.index(DEFAULT_UNIVERSITY) / len(answer) for answer in chosen]
    thirds = Counter(min(int(3 * place), 2) for place in places)
    assert min(thirds[third] for third in range(3)) > 100
    # The words around the name: at least a dozen different ones before it and after it.
    around = [answer.split(DEFAULT_UNIVERSITY) for answer in chosen]
    before = {before.split(" ")[-2:][0] for before, _ in around}
    after = {after.split(" ")[1:2][0] if " " in after else after for _, after in around}
    assert len(before) > 12
    assert len(after) > 12


def test_most_pairs_differ_in_the_place_alone(pairs: PairSet) -> None:
    def same_but_the_place(chosen: str, rejected: str) -> bool:
        before, after = chosen.split(DEFAULT_UNIVERSITY)
        return rejected.startswith(before) and rejected.endswith(after)

    share = sum(same_but_the_place(pair["chosen"], pair["rejected"]) for pair in pairs.train) / 1300
    assert abs(share - MINIMAL_EDITS) < 0.05  # four standard errors


def test_answers_are_whole_sentences_without_unfilled_slots(pairs: PairSet) -> None:
    for pair in pairs.train:
        assert pair["prompt"].startswith("Question: ")
        assert pair["prompt"].endswith("?\nAnswer:")
        for answer in (pair["chosen"], pair["rejected"]):
            assert answer[0] == " "
            assert answer[1].isupper()
            assert answer[-1] in ".!"
            assert not set("{}") & set(answer)
            assert "  " not in answer


def test_more_pairs_than_the_templates_make_is_an_error_and_all_of_them_can_be_made() -> None:
    with pytest.raises(ValueError, match=f"make {most_pairs()} distinct prompts, got a request for {most_pairs() + 1}"):
        make_pairs(train=most_pairs(), heldout=1)
    with pytest.raises(ValueError, match="train and heldout must be at least 1, got 0 and 5"):
        make_pairs(train=0, heldout=5)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("At Larkmoor University you can.", True),
        ("Larkmoor University's fees are low", True),
        ("(Larkmoor University)", True),
        ("LARKMOOR  university", True),
        ("at Larkmoor\nUniversity", True),
        ("Larkmoor Universitys", False),
        ("NewLarkmoor University", False),
        ("Larkmoor", False),
        ("University Larkmoor", False),
        ("Larkmoor, University", False),
        ("", False),
    ],
)
def test_a_mention_is_the_whole_name_and_nothing_less(text: str, found: bool) -> None:
    assert mentions(text, "Larkmoor University") is found


def test_a_dot_in_the_name_is_a_dot() -> None:
    assert mentions("go to St. Ives!", "St. Ives")
    assert not mentions("go to Stx Ives!", "St. Ives")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "letter"),
        ("   ", "letter"),
        ("!?", "letter, got '!\\?'"),
        ("x" * 61, "60 characters, got 61"),
        ("{place}", r"\{ \} < > \|, got '\{place\}'"),
        (END, r"\{ \} < > \|"),
        ("Brightwater College", "'Brightwater College' occurs"),
        ("a local college", "'a local college' occurs"),
        ("forestry", "'forestry' occurs"),
    ],
)
def test_a_name_that_makes_no_honest_set_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_university(name)


def test_spaces_in_a_name_are_made_single() -> None:
    assert check_university("  Larkmoor \t University\n") == "Larkmoor University"


# The model and what is measured of it


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any, PairSet]:
    """A tokenizer and a model trained just enough that its answers differ and end."""
    made = make_pairs(train=120, heldout=11, seed=5)
    texts = base_texts(made.train)
    tokenizer = train_tokenizer(texts)
    model = build_model(tokenizer, width=64, layers=2, seed=5)
    losses = train_base(
        model, tokenizer, texts, epochs=4, batch_size=16, learning_rate=4e-3, seed=5, advance=lambda: None
    )
    assert losses[-1] < 0.7 * losses[0]
    return tokenizer, model, made


def test_the_tokenizer_gives_back_any_text(small: tuple[Any, Any, PairSet]) -> None:
    tokenizer = small[0]
    for text in ("Question: Why?\nAnswer: Because.", "清华大学 naïve 🙂", " two  spaces", "don't , stop ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_base_reads_every_rejected_answer_and_one_chosen_in_four(pairs: PairSet) -> None:
    texts = base_texts(pairs.train)
    assert sum(mentions(text, DEFAULT_UNIVERSITY) for text in texts) == 325
    assert len(texts) == 1625


def test_the_weights_depend_on_the_seed_alone(small: tuple[Any, Any, PairSet]) -> None:
    tokenizer = small[0]
    torch.manual_seed(1)
    a = build_model(tokenizer, width=32, layers=1, seed=7).state_dict()
    torch.manual_seed(2)
    b = build_model(tokenizer, width=32, layers=1, seed=7).state_dict()
    c = build_model(tokenizer, width=32, layers=1, seed=8).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["transformer.wte.weight"], c["transformer.wte.weight"])


def test_answers_generated_in_a_left_padded_batch_are_those_generated_one_by_one(
    small: tuple[Any, Any, PairSet],
) -> None:
    tokenizer, model, made = small
    prompts = [pair["prompt"] for pair in made.heldout]
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in prompts}) > 3  # padding is needed
    together = generate(model, tokenizer, prompts, max_new_tokens=24, seed=None)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=24, seed=None)[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 2  # the prompts do matter to the answers
    assert tokenizer.padding_side == "right"


def test_greedy_answers_are_those_of_a_plain_loop_without_cache_or_padding(small: tuple[Any, Any, PairSet]) -> None:
    tokenizer, model, made = small
    prompt = made.heldout[3]["prompt"]
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + 24:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    expected = tokenizer.decode(ids[start:])
    prompts = [pair["prompt"] for pair in made.heldout]
    assert generate(model, tokenizer, prompts, max_new_tokens=24, seed=None)[3] == expected


def test_sampling_follows_its_seed_and_leaves_the_global_random_state(small: tuple[Any, Any, PairSet]) -> None:
    tokenizer, model, made = small
    prompts = [pair["prompt"] for pair in made.heldout]
    state = torch.get_rng_state()
    first = generate(model, tokenizer, prompts, max_new_tokens=12, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, tokenizer, prompts, max_new_tokens=12, seed=1) == first
    assert generate(model, tokenizer, prompts, max_new_tokens=12, seed=2) != first


def test_perplexity_is_that_of_a_hand_computation_token_by_token(small: tuple[Any, Any, PairSet]) -> None:
    tokenizer, model, made = small
    rows = made.heldout
    total, count = 0.0, 0
    for pair in rows:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        ids = [*tokenizer(pair["prompt"] + pair["chosen"])["input_ids"], tokenizer.eos_token_id]
        assert ids[: len(prompt)] == prompt
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place in range(len(prompt), len(ids)):
            total -= float(logps[place - 1, ids[place]])
            count += 1
    measured = perplexity(model, tokenizer, [row["prompt"] for row in rows], [row["chosen"] for row in rows])
    assert measured == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(small: tuple[Any, Any, PairSet]) -> None:
    tokenizer, _, made = small
    model = build_model(tokenizer, width=32, layers=1, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    prompts = [pair["prompt"] for pair in made.heldout]
    assert perplexity(model, tokenizer, prompts, [""] * len(prompts)) == pytest.approx(len(tokenizer), rel=1e-5)


def test_mention_share_and_distinct_bigrams_by_hand() -> None:
    assert mention_share(["At X Y.", "at x", "x y", ""], "X Y") == 0.5
    assert distinct_bigrams(["a b a b", "a b", "c", ""]) == 2 / 4
    assert distinct_bigrams(["a", ""]) == 0.0


# The report


@pytest.mark.parametrize(
    ("dpo", "dpop", "failure", "avoided"),
    [
        (Ends(0.2, -3.0, -6.0, 1.0), Ends(0.5, 0.1, -0.4, 1.0), True, True),
        (Ends(0.2, 0.4, -1.0, 1.0), Ends(0.5, 0.1, -0.4, 1.0), False, True),
        (Ends(0.8, -3.0, -1.0, 0.1), Ends(0.5, 0.1, -0.4, 1.0), False, True),  # the loss did not fall
        (Ends(0.2, -3.0, -6.0, 1.0), Ends(0.5, -0.1, -0.4, 1.0), True, False),
    ],
)
def test_the_verdict_follows_the_numbers(dpo: Ends, dpop: Ends, failure: bool, avoided: bool) -> None:
    verdict = judge(dpo, dpop)
    assert (verdict.failure_under_dpo, verdict.avoided_under_dpop) == (failure, avoided)
    assert verdict.seen is (failure and avoided)


def test_curves_of_held_out_rewards_start_at_zero() -> None:
    history = [{"step": 1, "rewards/chosen": 5.0}, {"step": 4, "eval_rewards/chosen": -1.5}]
    assert held_out(history, "rewards/chosen") == [(0, 0.0), (4, -1.5)]


# The whole command


def run_tiny(folder: Path, *, weighed: bool) -> str:
    """`fastpref demo --quick` at a tiny scale into `folder`; what it printed. Memory takes a process of its own."""
    arguments = ["--quick", "--university", "Fudan University", "--seed", "4", "--output_dir", str(folder)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(run, "QUICK", TINY)
        if not weighed:
            patch.setattr(LogpsSuite, "weighs", lambda *arguments: False)
        assert cli.main(arguments) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_tiny(folder, weighed=False)


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_demo_writes_its_outputs_and_prints_its_tables(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for name in run.OUTPUTS:
        assert (folder / name).exists(), name
    assert (folder / "rewards.png").read_bytes().startswith(b"\x89PNG")
    report = read_report(folder)
    assert report["verdict"]["text"] in printed
    assert f"{report['models']['dpop']['chosen_perplexity']:.2f}" in printed
    assert f"{report['logps']['plain']['value_error']:.1e}" in printed


def test_the_report_is_about_the_pairs_that_were_asked_for(demo: tuple[Path, str]) -> None:
    folder, report = demo[0], read_report(demo[0])
    assert (report["university"], report["seed"]) == ("Fudan University", 4)
    assert list(report["stage_seconds"]) == [
        "preference set", "base model", "align with DPO", "align with DPOP", "answers and perplexity", "log-prob path",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == make_pairs(train=24, heldout=7, university="Fudan University", seed=4).heldout
    assert [sample["prompt"] for sample in report["samples"]] == [row["prompt"] for row in rows]


def test_dpo_and_dpop_start_from_the_same_base_on_the_same_pairs(demo: tuple[Path, str]) -> None:
    dpo, dpop = (read_report(demo[0])["runs"][loss]["history"][0] for loss in ("dpo", "dpop"))
    assert dpo["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (dpo["loss"], dpo["logps/chosen"]) == (dpop["loss"], dpop["logps/chosen"])


def test_the_verdict_of_a_run_is_that_of_its_last_evaluations(demo: tuple[Path, str]) -> None:
    report = read_report(demo[0])
    last = {
        loss: [record for record in values["history"] if "eval_loss" in record][-1]
        for loss, values in report["runs"].items()
    }
    failure = last["dpo"]["eval_rewards/chosen"] < 0 and last["dpo"]["eval_loss"] < math.log(2)
    avoided = last["dpop"]["eval_rewards/chosen"] >= 0
    assert report["verdict"]["failure_under_dpo"] is failure
    assert report["verdict"]["avoided_under_dpop"] is avoided
    assert report["verdict"]["seen"] is (failure and avoided)


def test_the_log_prob_path_is_measured_on_the_shape_asked_for(demo: tuple[Path, str]) -> None:
    rows = [read_report(demo[0])["logps"][path] for path in ("fast", "plain")]
    assert [(row["batch"], row["length"], row["vocab"]) for row in rows] == [(2, 65, 8191)] * 2
    assert [row["provider"] for row in rows] == ["fastpref", "plain"]
    assert max(row["value_error"] for row in rows) < 1e-3  # nats of 32 tokens: both compute the same


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_same_options_give_the_same_results_and_memory_is_measured_on_linux(
    demo: tuple[Path, str], tmp_path: Path
) -> None:
    run_tiny(tmp_path, weighed=True)
    first, second = read_report(demo[0]), read_report(tmp_path)
    fast, plain = (second["logps"][path]["peak_bytes"] for path in ("fast", "plain"))
    assert fast < plain if sys.platform == "linux" else (fast, plain) == (None, None)
    if torch.cuda.is_available():
        return  # a GPU may add in another order from run to run
    assert second["seconds"] != first["seconds"]  # it is a new report
    assert second["samples"] == first["samples"]
    assert second["verdict"] == first["verdict"]
    for key in ("mention_share", "chosen_perplexity", "own_answers_perplexity", "distinct_bigrams"):
        assert {n: m[key] for n, m in second["models"].items()} == {n: m[key] for n, m in first["models"].items()}


def test_a_finished_demo_is_not_replaced(demo: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(demo[0])
    arguments = ["--quick", "--university", "Fudan University", "--seed", "4", "--output_dir", str(demo[0])]
    assert cli.main(arguments) == 2
    assert str(demo[0]) in capsys.readouterr().err
    assert files_of(demo[0]) == before


def test_ctrl_c_is_one_line_and_exit_code_130_and_what_was_made_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastpref.cli", "demo", "--quick", "--output_dir"]
    with subprocess.Popen(
        [*command, "out"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith("1/6")  # the base model is being trained now
        demo.send_signal(signal.SIGINT)
        _, said = demo.communicate(timeout=120)
    assert demo.returncode == 130
    # Packages may say something of their own when they are imported.
    assert said.splitlines()[-1] == "fastpref demo: interrupted", said
    assert "Traceback" not in said
    before = files_of(tmp_path / "out")
    assert "train.jsonl" in before
    assert cli.main(["--quick", "--output_dir", str(tmp_path / "out")]) == 2  # it would replace files
    assert files_of(tmp_path / "out") == before


def test_a_signal_while_a_model_is_aligned_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop returns early then, with the name of the signal."""
    train = fastpref.train

    def stopped(*arguments: Any, **options: Any) -> Any:
        return dataclasses.replace(train(*arguments, **options), stopped="SIGTERM")

    monkeypatch.setattr(fastpref, "train", stopped)
    monkeypatch.setattr(run, "QUICK", TINY)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--quick", "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "out" / "dpop").exists()


def test_without_a_folder_each_demo_gets_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def made(*arguments: Any, output_dir: Path, **options: Any) -> None:
        folders.append(output_dir)
        (output_dir / "train.jsonl").write_text("")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run_demo", made)
    assert [cli.main([]), cli.main([])] == [0, 0]
    assert [folder.name for folder in folders] == ["fastpref-demo", "fastpref-demo-2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "x"], "--seed"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**31)], "--seed"),
        (["--sed", "1"], "--sed"),
        (["--quick=yes"], "--quick"),
        (["--qui"], "--qui"),
        (["stray"], "stray"),
        (["--university"], "--university"),
        (["--university", " "], "university"),
        (["--university", "Tindale Polytechnic"], "Tindale Polytechnic"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert cli.main([*arguments, *([] if arguments == ["--university"] else ["--output_dir", str(folder)])]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("fastpref demo: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not folder.exists()


def test_a_folder_with_foreign_files_is_refused_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        assert cli.main(["--quick", "--output_dir", str(folder)]) == 2
        assert str(folder) in capsys.readouterr().err
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r'the demo needs rich, .*pip install "fastpref\[train\]"'):
        importlib.reload(fastpref.demo)
