"""What the README says of the losses and of the commands is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastpref
from fastpref.losses.__main__ import table

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_losses_is_the_registry():
    written = re.search(r"<!-- losses:[^\n]*-->\n(.*?)<!-- end of losses -->", README, re.DOTALL)
    assert written is not None
    assert written[1] == table(), "run python -m fastpref.losses and put what it prints into README.md"


def test_the_swap_runs_as_it_stands_and_agrees_with_the_truth():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    head = torch.nn.Linear(8, 13)
    embed = torch.nn.Embedding(13, 8)

    def model(input_ids, attention_mask):
        return type("Output", (), {"logits": head(embed(input_ids))})

    input_ids = torch.randint(13, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, :2] = -100
    names = {"torch": torch, "model": model, "ref_model": model, "input_ids": input_ids, "labels": labels}
    exec(code[1], {**names, "attention_mask": torch.ones_like(input_ids)}, names)
    truth = fastpref.reference.sequence_logps(model(input_ids, None).logits, labels, dtype=torch.float64)
    torch.testing.assert_close(names["policy"].double(), truth, rtol=1e-6, atol=0)
    assert names["out"].loss.item() == pytest.approx(0.6931472, rel=1e-6)  # equal models: ln 2
    assert head.weight.grad is not None


def test_the_code_without_logits_runs_as_it_stands_and_agrees_with_the_truth():
    transformers = pytest.importorskip("transformers", reason="the train extra is not installed")
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    config = transformers.GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    input_ids = torch.randint(13, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, :2] = -100
    truth = fastpref.reference.sequence_logps(model(input_ids).logits, labels, dtype=torch.float64)
    names = {"fastpref": fastpref, "model": model, "head": model.lm_head, "input_ids": input_ids, "labels": labels}
    names |= {"attention_mask": torch.ones_like(input_ids), "hidden": model.transformer(input_ids).last_hidden_state}
    names |= {"reference": truth.detach().float()}
    exec(code, names, names)
    torch.testing.assert_close(names["policy"].double(), truth, rtol=1e-6, atol=0)
    assert names["out"].loss.item() == pytest.approx(0.6931472, rel=1e-5)  # its own reference: ln 2
    assert model.lm_head.weight.grad is not None


def test_the_code_for_shared_rows_runs_as_it_stands_and_agrees_with_the_truth():
    transformers = pytest.importorskip("transformers", reason="the train extra is not installed")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "pack_pairs" in code]
    config = transformers.GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=1, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    chosen, rejected = [([1, 2, 3, 4], 2), ([5, 6, 7], 1)], [([1, 2, 8], 2), ([5, 9, 10, 11, 12], 1)]
    names = {"fastpref": fastpref, "model": model, "chosen": chosen, "rejected": rejected}
    exec(code, names, names)
    for found, (ids, start) in zip(names["policy"], [*chosen, *rejected], strict=True):
        row = torch.tensor([ids])
        labels = row.masked_fill(torch.arange(len(ids)) < start, -100)
        truth = fastpref.reference.sequence_logps(model(input_ids=row).logits, labels, dtype=torch.float64)
        torch.testing.assert_close(found[None].double(), truth, rtol=1e-6, atol=0)


def test_every_swap_of_a_trainer_is_an_import_that_works():
    lines = re.findall(r"`(from fastpref\.integrations[^`]*)`", README)
    trainers = {re.match(r"from fastpref\.integrations\.(\w+) ", line)[1] for line in lines}
    assert trainers == {"trl", "verl", "openrlhf", "dpo", "minimind"}
    for line in lines:
        if ".trl " not in line:  # its own tests import TRL
            exec(line, {})


def test_the_lines_for_llama_factory_and_nemo_rl_give_what_they_replace():
    generator = torch.Generator().manual_seed(0)
    logits, input_ids = torch.randn(2, 6, 13, generator=generator), torch.randint(13, (2, 6), generator=generator)
    labels = input_ids.clone()
    labels[:, :2] = -100
    by_token = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    scored = labels[:, 1:] != -100

    (line,) = re.findall(r"`(all_logps, valid_length = [^`]*)`", README)
    names = {"fastpref": fastpref, "all_logits": logits, "labels": labels}
    exec(line, names)
    torch.testing.assert_close(names["all_logps"], (by_token * scored).sum(1))
    assert torch.equal(names["valid_length"], scored.sum(1))

    (line,) = re.findall(r"`per_token_logps = ([^`]*)`", README)
    torch.testing.assert_close(eval(line, {**names, "logits": logits}), by_token * scored)

    names |= {"next_token_logits": logits, "logits": logits, "input_ids": input_ids}
    lines = re.findall(r"`(?:logprobs =|return) (fastpref\.token_logps[^`]*)`", README)
    assert len(lines) == 2
    for line in lines:
        torch.testing.assert_close(eval(line, names), by_token)


def test_the_code_for_process_groups_runs_as_it_stands_and_agrees_with_the_truth():
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "vocab_group" in code]
    hidden, weight = torch.randn(2, 6, 8), torch.randn(13, 8)
    labels = torch.randint(13, (2, 6))
    truth = fastpref.reference.sequence_logps(hidden @ weight.T, labels, dtype=torch.float64)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        whole = torch.distributed.group.WORLD
        names = {
            "fastpref": fastpref,
            "tensor_group": whole,
            "context_group": whole,
            "hidden": hidden,
            "labels": labels,
        }
        names |= {"weight": weight, "weight_part": weight, "logits_part": hidden @ weight.T, "hidden_piece": hidden}
        names |= {"logits_piece": hidden @ weight.T, "labels_piece": labels}
        for line in re.findall(r"^policy = .*", code, re.MULTILINE):
            exec(line, names)
            torch.testing.assert_close(names["policy"].double(), truth, rtol=1e-6, atol=0)
    finally:
        torch.distributed.destroy_process_group()


def test_ci_installs_what_the_readme_s_test_command_installs():
    extras = r'pip install (?:--quiet )?-c constraints\.txt -e "(\.\[[\w,]*test\])"'
    ci = (Path(__file__).parents[1] / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(extras, README) == re.findall(extras, ci) == [".[train,trl,test]"]
