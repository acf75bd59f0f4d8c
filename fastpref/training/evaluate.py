"""Evaluation on held-out pairs: the same metrics as training, and sample generations."""

from __future__ import annotations

import math

import torch

from fastpref.losses import preference_loss
from fastpref.training.forward import batch_logps, reference_logps
from fastpref.training.metrics import means, pair_sums, read_records, write_record, zero_sums
from fastpref.training.prepare import Run

SAMPLES = "samples.jsonl"


def evaluate(run: Run) -> dict[str, float]:
    """The metrics of the held-out pairs, named eval_*; the processes share the pairs.

    A loss that does not separate by pair is computed a batch at a time, so its value depends on `batch_size`.
    """
    config, spec, accelerator, device = run.config, run.spec, run.accelerator, run.accelerator.device
    sums, has_penalty = zero_sums(device), spec.penalty is not None
    share = run.eval_pairs[accelerator.process_index :: accelerator.num_processes]
    run.model.eval()
    with torch.no_grad(), run.console.bar("evaluation", len(share)) as bar:
        for begin in range(0, len(share), config.batch_size):
            chunk = share[begin : begin + config.batch_size]
            batch = run.collate(chunk)
            policy = batch_logps(run.model, batch, config, reduction=spec.reduction)
            output = preference_loss(*policy, *reference_logps(batch, spec), **config.loss_arguments)
            sums += pair_sums(output, *policy, batch.tokens)
            bar.advance(len(chunk))
    run.model.train()
    totals = accelerator.reduce(sums, "sum").tolist()
    return means(totals, loss_name=spec.name, has_penalty=has_penalty, prefix="eval_")


def prepare_samples(run: Run, start: int) -> None:
    """Keep the samples of the steps that a resumed run has made; a fresh run starts without."""
    if run.config.sample_prompts and run.accelerator.is_main_process:
        kept = read_records(run.output_dir / SAMPLES, start)
        with (run.output_dir / SAMPLES).open("w", encoding="utf-8") as file:
            for record in kept:
                write_record(file, record)


def write_samples(run: Run, step: int) -> None:
    """Append greedy answers to the first `sample_prompts` held-out prompts to samples.jsonl."""
    config, model, device = run.config, run.model, run.accelerator.device
    if not config.sample_prompts:
        return
    model.eval()
    with (run.output_dir / SAMPLES).open("a", encoding="utf-8") as file, torch.no_grad():
        for pair in run.eval_pairs[: config.sample_prompts]:
            if not len(pair.prompt):
                continue
            prompt = torch.from_numpy(pair.prompt).long().to(device)[None]
            room = getattr(model.config, "max_position_embeddings", None) or math.inf
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
                answer = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=min(config.max_new_tokens, room - prompt.shape[1]),
                    do_sample=False,
                    pad_token_id=run.pad_id,
                )
            record = {
                "step": step,
                "row": pair.row,
                "prompt": run.tokenizer.decode(pair.prompt.tolist()),
                "generated": run.tokenizer.decode(answer[0, prompt.shape[1] :].tolist()),
                "chosen": run.tokenizer.decode(pair.chosen.ids[pair.chosen.start :].tolist()),
                "rejected": run.tokenizer.decode(pair.rejected.ids[pair.rejected.start :].tolist()),
            }
            write_record(file, record)
    model.train()
