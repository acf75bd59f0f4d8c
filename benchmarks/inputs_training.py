"""What every contestant of a training run gets: a folder with initial weights, tokenizer and rows, and their order."""

from __future__ import annotations

import json
import random
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from fastpref.options import UsageError

from .cases_training import PAIRS_FILE, TOKENIZER_FOLDER, TrainingCase

WORDS = 400  # of the made pairs' tokenizer
SEED = 0
RESPONSES = ("chosen", "rejected")


def write_inputs(case: TrainingCase, folder: Path, data: Path) -> None:
    """In `folder`: initial/ (random weights and the tokenizer, as transformers has them), rows.jsonl and steps.json.

    An initial/ that is there already stays: pairs of another length go with the same one.
    """
    rows, tokenizer = _real(case, data) if case.length is None else (_made_rows(case), word_tokenizer())
    if not (folder / "initial").exists():
        _write_initial(case, folder / "initial", tokenizer)
    (folder / "steps.json").write_text(json.dumps(_steps(case, rows, tokenizer)))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_initial(case: TrainingCase, folder: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    eos = tokenizer.eos_token_id
    config = case.shape.config(bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos)
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _real(case: TrainingCase, data: Path) -> tuple[list[dict[str, Any]], Any]:
    from transformers import AutoTokenizer

    from fastpref.training.data.templates import DEFAULT_CHAT_TEMPLATE

    for path in (data / PAIRS_FILE, data / TOKENIZER_FOLDER):
        if not path.exists():
            raise UsageError(f"case {case.name} needs {path}: --data names the folder of {PAIRS_FILE}")
    with (data / PAIRS_FILE).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, case.pairs)]
    tokenizer = AutoTokenizer.from_pretrained(data / TOKENIZER_FOLDER)
    tokenizer.chat_template = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
    return rows, tokenizer


def _made_rows(case: TrainingCase) -> list[dict[str, Any]]:
    """Half of each sequence is the prompt; the last token of a response is the EOS that plain text gets."""
    assert case.length is not None
    draw = random.Random(SEED)
    prompt, response = case.length // 2, case.length - case.length // 2 - 1

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(count))

    rows: list[dict[str, Any]] = []
    for index in range(case.pairs):
        shorter = (index % 5, 1 + 3 * index % 7) if case.ragged else (0, 0)
        row: dict[str, Any] = {
            "prompt": text(prompt),
            "chosen": f" {text(response - shorter[0])}",
            "rejected": f" {text(response - shorter[1])}",
        }
        if case.references:
            row |= {"ref_chosen_logps": -5.0 * response, "ref_rejected_logps": -5.0 * response}
        rows.append(row)
    return rows


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", *(f"w{number}" for number in range(WORDS))]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<eos>")


def _steps(case: TrainingCase, rows: list[dict[str, Any]], tokenizer: Any) -> list[list[dict[str, Any]]]:
    """The pairs of each step as fastpref's loop tokenises, cuts and orders them; the order hangs on no model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastpref.training.config import TrainConfig
    from fastpref.training.prepare import prepare

    stand_in = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=case.max_length,
    )
    with tempfile.TemporaryDirectory(prefix="fastpref-training-") as output:
        config = TrainConfig(
            output_dir=output,
            max_length=case.max_length,
            batch_size=case.per_step,
            max_steps=case.steps,
            group_by_length=False,
            seed=SEED,
            progress=False,
        )
        run = prepare(config, model=LlamaForCausalLM(stand_in), tokenizer=tokenizer, train_dataset=rows)
        # A shorter last step of an epoch would not lie at the same place for everybody.
        if len(run.pairs) < case.pairs:
            raise ValueError(f"case {case.name} takes {case.pairs} pairs; of its rows {len(run.pairs)} are left")
        return [[_as_json(run.pairs[index]) for index in run.plan.step(step)] for step in range(case.steps)]


def _as_json(pair: Any) -> dict[str, Any]:
    named = {name: getattr(pair, name) for name in ("chosen", "rejected")}
    references = [pair.ref_chosen_logp, pair.ref_rejected_logp]
    return {
        "row": pair.row,
        "references": None if None in references else references,
        **{name: {"ids": response.ids.tolist(), "start": response.start} for name, response in named.items()},
    }


class Inputs:
    """A written folder as a contestant reads it.

    `steps` are the pairs of each step: `row`, `references` (or None), and for `chosen` and `rejected` the `ids` of the
    whole sequence and the `start` of what is scored.
    """

    def __init__(self, case: TrainingCase, folder: Path, device: str) -> None:
        self.case, self.device = case, device
        self.initial = str(folder / "initial")
        lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.steps: list[list[dict[str, Any]]] = json.loads((folder / "steps.json").read_text())

    @property
    def tokens(self) -> list[int]:
        """Of each step: a pair counts as two whole sequences, however a contestant lays them out."""
        return [sum(len(pair[name]["ids"]) for pair in pairs for name in RESPONSES) for pairs in self.steps]
