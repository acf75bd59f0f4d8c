"""kill -9 at any moment, resume, and the run ends with the bits of one that nobody disturbed.

The runs are made by a second Python process, this file as a script: it imports everything once and forks a child for
each run, which a process with torch's threads in it could not do.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from fastpref.folders import MARKER

KILLS = 20
TIMED = ("tokens_per_second", "peak_memory")
LIMITS = {"full-model": 30_000, "full-optimizer": 70_000}  # bytes of a file
OPTIONS: dict[str, Any] = {
    "max_length": 64, "batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 24, "learning_rate": 1e-3,
    "warmup_steps": 5, "schedule": "cosine", "loss": "dpop", "disable_dropout": False, "save_every": 1,
    "keep_checkpoints": 1, "logging_every": 3, "eval_every": 4, "save_best": True, "sample_prompts": 1,
    "max_new_tokens": 3, "progress": False,
}  # fmt: skip


class Script:
    """The script below, which makes the undisturbed run and then each part that a test asks for, once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.errors = folder, folder / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(folder)],
                cwd=folder,  # outside a repository, or every run asks git twice
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @functools.cache  # noqa: B019 - a module's fixture
    def part(self, name: str) -> dict[str, Any]:
        """What the script has found out in a part."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(name, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self.errors.read_text()[-3000:]
        return json.loads(answer)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    script = Script(tmp_path_factory.mktemp("kill"))
    yield script
    script.process.communicate()  # the end of its input is the end of the script


def outcome(run: Path) -> dict[str, Any]:
    """All that a run has computed, without what a clock or the process shows."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    files = [run / "samples.jsonl", *sorted((run / "best").iterdir()), *sorted((run / "model").iterdir())]
    last = run / "checkpoint-24"
    return {
        "records": [{name: value for name, value in record.items() if name not in TIMED} for record in records],
        "files": {str(file.relative_to(run)): file.read_bytes() for file in files},
        "checkpoint": {name: (last / name).read_bytes() for name in ("model.safetensors", "optimizer.pt", "rng_0.pt")},
        "names": {path.name for path in run.iterdir()} - {"resumed.jsonl"},
    }


def assert_same(run: Path, undisturbed: Path) -> None:
    one, other = outcome(run), outcome(undisturbed)
    assert one["records"] == other["records"]
    assert one["names"] == other["names"]  # nothing is left lying about
    for part in ("files", "checkpoint"):
        assert one[part].keys() == other[part].keys()
        for name, content in one[part].items():
            assert content == other[part][name], name


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_ends_with_the_same_bits(script: Script) -> None:
    report = script.part("random")
    assert report["kills"] == KILLS
    assert report["kills while saving"] >= 3  # or the moments would not be those that matter
    for name in report["newest"]:
        assert_same(script.folder / name, script.folder / "undisturbed")


@pytest.mark.slow
def test_a_run_killed_before_every_single_operation_of_a_save_ends_with_the_same_bits(script: Script) -> None:
    report = script.part("each")
    assert {"save_pretrained", "save", "fsync", "rename", "unlink", "rmdir"} <= set(report["operations"])
    assert report["steps left"] > 0  # the last child was not killed because its save had no more operations
    assert_same(script.folder / "each", script.folder / "undisturbed")


@pytest.mark.slow
def test_a_kill_never_takes_a_step_back_that_was_saved(script: Script) -> None:
    for steps in script.part("random")["newest"].values():
        assert steps == sorted(steps)


def test_a_run_killed_while_it_saves_ends_with_the_same_bits(script: Script) -> None:
    report = script.part("one")
    assert report["killed while saving"]
    assert_same(script.folder / "one", script.folder / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [("full-model", "model.safetensors"), ("full-optimizer", "optimizer.pt")])
def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint_and_the_run_goes_on_to_the_same_bits(
    script: Script, name: str, file: str
) -> None:
    """The system refuses to let any file grow beyond a size, between those of the small ones and that of `file`."""
    before, run = script.part(name), script.folder / name
    message = (script.folder / f"{name}.error").read_text()
    assert "File too large" in message
    assert message.startswith(f"{run / 'checkpoint-3'} could not be written: ")
    assert message.endswith(f"The newest checkpoint is {run / 'checkpoint-2'}; mend that and go on with resume")
    assert before["newest"] == 2
    assert before["hidden"] == []
    assert (script.folder / "undisturbed" / "checkpoint-24" / file).stat().st_size > LIMITS[name]
    assert_same(run, script.folder / "undisturbed")


class _Script:
    """Runs in children, and kills them."""

    def __init__(self, folder: Path) -> None:
        import torch
        from conftest import byte_tokenizer
        from rich import console, progress  # noqa: F401  (imported once, for all children)
        from torch.utils import tensorboard  # noqa: F401

        from fastpref.training import loop

        torch.set_num_threads(1)
        loop.draw = lambda run, history: None  # takes longer than the run
        self.folder, self.loop, self.tokenizer = folder, loop, byte_tokenizer()
        self.rows = [
            {
                "prompt": f"what is the colour of sky {i}?",
                "chosen": " the sky is blue" + " today" * (i % 4),
                "rejected": f" {i}" * (1 + i % 3) + " green",
            }
            for i in range(13)
        ]
        self.warm_up()
        self.saving = mmap.mmap(-1, 1)  # shared with the children: 1 while they write, 2 when they have written

    def model(self) -> Any:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(11)
        shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 302}
        return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape))

    def warm_up(self) -> None:
        """What transformers imports and compiles when it is first used, and versions, once for all children."""
        import torch

        from fastpref.environment import package_version

        importlib.metadata.version = functools.cache(importlib.metadata.version)
        for name in ("fastpref", "torch", "triton", "numpy", "transformers", "datasets", "accelerate", "peft", "trl"):
            package_version(name)

        model = self.model()
        model.save_pretrained(self.folder / "warm")
        type(model).from_pretrained(self.folder / "warm")
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=1, do_sample=False, pad_token_id=0)

    def train(self, name: str) -> None:
        from fastpref.training import TrainConfig, train
        from fastpref.training.checkpoints.save import checkpoint_folders

        output = self.folder / name
        random.seed(1)  # fork has made another seed
        config = TrainConfig(**OPTIONS, output_dir=str(output), resume=bool(checkpoint_folders(output)) or None)
        train(config, model=self.model(), tokenizer=self.tokenizer, train_dataset=self.rows, eval_dataset=self.rows[:2])

    def fork(self, name: str, prepare: Callable[[], None] = lambda: None) -> int:
        """A child that makes or goes on with the run of that name."""
        self.saving[0] = 0
        child = os.fork()
        if child:
            return child
        try:
            with (self.folder / f"{name}.log").open("a") as log:
                os.dup2(log.fileno(), 2)
                prepare()
                self.note_saves()
                self.train(name)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def note_saves(self) -> None:
        for function in ("save_checkpoint", "save_trained_model", "keep_best"):
            original = getattr(self.loop, function)

            def noted(*args: Any, original: Any = original) -> Any:
                self.saving[0] = 1
                try:
                    return original(*args)
                finally:
                    self.saving[0] = 2

            setattr(self.loop, function, noted)

    def wait(self, child: int, name: str) -> bool:
        """Whether it came to its end; False if it was killed."""
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return False
        if os.WEXITSTATUS(status) != 0:
            sys.exit((self.folder / f"{name}.log").read_text()[-3000:])
        return True

    def newest(self, name: str) -> int:
        from fastpref.training.checkpoints.save import checkpoint_folders

        found = checkpoint_folders(self.folder / name)
        return int(found[-1].name.removeprefix("checkpoint-")) if found else 0

    def random_kills(self, start: float, step: float) -> dict[str, Any]:
        """Twenty kills, at moments from a child's start to its third step or so, as the times were without kills.

        A run that gets to its end before is followed by another one.
        """
        moments, saving, kills, name = random.Random(5), 0, 0, "random-0"
        newest: dict[str, list[int]] = {name: []}
        while kills < KILLS:
            child = self.fork(name)
            time.sleep(moments.uniform(start / 2, start + 3 * step))
            os.kill(child, signal.SIGKILL)
            if self.wait(child, name):
                name = f"random-{len(newest)}"
                newest[name] = []
                continue
            kills += 1
            saving += self.saving[0] == 1
            newest[name].append(self.newest(name))
        self.wait(self.fork(name), name)
        return {"kills": kills, "kills while saving": saving, "newest": newest}

    def one_kill(self) -> dict[str, Any]:
        """A kill in the middle of a save, and the run's end."""
        child = self.fork("one")
        while not self.saving[0]:
            time.sleep(0.0001)
        os.kill(child, signal.SIGKILL)
        self.wait(child, "one")
        killed = self.saving[0] == 1
        self.wait(self.fork("one"), "one")
        return {"killed while saving": killed}

    def full_disk(self, name: str) -> dict[str, Any]:
        """A run whose files may not grow beyond a size after its second checkpoint; then, without limit, its end."""
        self.wait(self.fork(name, lambda: self.limit_files(LIMITS[name])), name)
        hidden = [path.name for path in (self.folder / name).glob(".*") if path.name != MARKER]
        found = {"newest": self.newest(name), "hidden": hidden}
        self.wait(self.fork(name), name)
        return found

    def limit_files(self, size: int) -> None:
        import resource

        from fastpref.training.checkpoints.durable import SaveError

        checkpoint, train = self.loop.save_checkpoint, self.train

        def limiting(*args: Any) -> Any:
            result = checkpoint(*args)
            if args[-1]["step"] == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return result

        def noting(name: str) -> None:
            try:
                train(name)
            except SaveError as error:
                (self.folder / f"{name}.error").write_text(str(error))

        self.loop.save_checkpoint, self.train = limiting, noting  # type: ignore[method-assign]

    def each_operation(self) -> Iterator[str]:
        """Kill a child before the first operation of its first save, the next one before the second, and so on."""
        for number in range(1, 1000):
            self.left = self.newest("each")
            reader, writer = os.pipe()
            child = self.fork("each", lambda number=number, writer=writer: self.kill_before(number, writer))
            os.close(writer)
            finished = self.wait(child, "each")
            with os.fdopen(reader) as pipe:
                name = pipe.read()
            if finished:
                return
            yield name

    def kill_before(self, number: int, writer: int) -> None:
        import shutil

        import torch
        from transformers import GPT2LMHeadModel

        counted = 0

        def count(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def counting(*args: Any, **kwargs: Any) -> Any:
                nonlocal counted
                counted += self.saving[0] == 1
                if counted == number and self.saving[0] == 1:
                    os.write(writer, name.encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(owner, name, counting)

        for owner, names in ((os, ("fsync", "rename", "replace", "unlink", "rmdir")), (torch, ("save",))):
            for name in names:
                count(owner, name)
        count(GPT2LMHeadModel, "save_pretrained")
        count(shutil, "rmtree")
        checkpoint = self.loop.save_checkpoint

        def first_only(*args: Any) -> Any:
            nonlocal counted
            result = checkpoint(*args)
            counted = 10**6  # past every number
            return result

        self.loop.save_checkpoint = first_only

    def run(self, answers: TextIO) -> None:
        """The undisturbed run; then a part for each line of input, and a line for what it has shown."""
        begin = time.perf_counter()
        child = self.fork("undisturbed")
        while not self.saving[0]:
            time.sleep(0.001)
        start = time.perf_counter() - begin
        self.wait(child, "undisturbed")
        step = (time.perf_counter() - begin - start) / OPTIONS["max_steps"]
        for line in sys.stdin:
            name = line.strip()
            if name == "random":
                found = self.random_kills(start, step)
            elif name == "each":
                found = {"operations": list(self.each_operation()), "steps left": OPTIONS["max_steps"] - self.left}
            elif name == "one":
                found = self.one_kill()
            else:
                found = self.full_disk(name)
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print goes to the errors
        _Script(Path(sys.argv[1])).run(answers)
