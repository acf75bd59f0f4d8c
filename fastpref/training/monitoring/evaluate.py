"""Evaluation on held-out pairs: the same metrics as training, and sample generations."""

from __future__ import annotations

import math
import os

import torch

from fastpref.training.checkpoints.durable import writing
from fastpref.training.data.batches import cut
from fastpref.training.distributed.processes import deal, is_sharded
from fastpref.training.memory.oom import explained
from fastpref.training.monitoring.metrics import keep_records, means, sums_of, write_record, zero_sums
from fastpref.training.precision import autocasts
from fastpref.training.run import Run
from fastpref.training.step import kl_estimate, score

SAMPLES = "samples.jsonl"


def evaluate(run: Run) -> dict[str, float]:
    """The metrics of the held-out pairs, named eval_*; the processes share the pairs.

    A loss that does not separate by pair is computed a batch at a time, so its value depends on `batch_size`.
    """
    spec, accelerator = run.spec, run.accelerator
    sums = zero_sums(spec, accelerator.device)
    batches = [([run.eval_pairs[index] for index in part], counts) for part, counts in deal(_batches(run), accelerator)]
    run.model.eval()
    with torch.no_grad(), run.console.bar("evaluation", len(run.eval_pairs), unit="pair") as bar:
        with explained(run, "an evaluation", batches[0][0]):
            kl = kl_estimate(run, batches)
        for chunk, counts in batches:
            with explained(run, "an evaluation", chunk):
                scored = score(run, run.model, chunk, kl=kl)
            if counts:
                sums += sums_of(scored)
            # The other processes do about as much.
            tokens = scored.batch.tokens * accelerator.num_processes
            bar.advance(len(chunk) * accelerator.num_processes, tokens=tokens)
    run.model.train()
    totals = accelerator.reduce(sums, "sum").tolist()
    return means(totals, spec, prefix="eval_")


def _batches(run: Run) -> list[list[int]]:
    """The held-out pairs in batches as large as a micro-batch may be, longest first where a pair's loss is its own."""
    sizes, plan = run.layout.sizes(run.eval_pairs), run.plan
    indices = range(len(run.eval_pairs))
    order = sizes.longest_first(indices) if run.spec.separable else indices
    return cut(order, sizes, batch_size=plan.batch_size, batch_tokens=plan.batch_tokens)


def prepare_samples(run: Run, start: int, *, evaluated: bool) -> None:
    """Keep the samples of the steps that a resumed run has made and evaluated; a fresh run starts without."""
    if run.config.sample_prompts and run.accelerator.is_main_process:
        keep_records(run.output_dir / SAMPLES, start=start, evaluated=evaluated)


def write_samples(run: Run, step: int) -> None:
    """Append greedy answers to the first `sample_prompts` held-out prompts to samples.jsonl.

    The main process does it; of a model that is sharded all must run it together, so every process calls this.
    """
    config, model, device = run.config, run.model, run.accelerator.device
    main, sharded = run.accelerator.is_main_process, is_sharded(run.accelerator)
    if not config.sample_prompts or not (main or sharded):
        return
    model.eval()
    path = run.output_dir / SAMPLES
    with writing(path), path.open("a", encoding="utf-8") as file, torch.no_grad():
        for pair in [pair for pair in run.eval_pairs if len(pair.prompt)][: config.sample_prompts]:
            prompt = torch.from_numpy(pair.prompt).long().to(device)[None]
            room = getattr(model.config, "max_position_embeddings", None) or math.inf
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts(config, device)):
                answer = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=min(config.max_new_tokens, room - prompt.shape[1]),
                    do_sample=False,
                    synced_gpus=sharded,  # until the last of them is done
                    pad_token_id=run.layout.pad_id,
                )
            if not main:
                continue
            record = {
                "step": step,
                "row": pair.row,
                "prompt": run.tokenizer.decode(pair.prompt.tolist()),
                "generated": run.tokenizer.decode(answer[0, prompt.shape[1] :].tolist()),
            }
            for name, response in zip(("chosen", "rejected"), (pair.chosen, pair.rejected), strict=True):
                record[name] = run.tokenizer.decode(response.ids[response.start :].tolist())
            if pair.desirable is not None:
                record |= {"completion": record.pop("chosen"), "label": pair.desirable}
                del record["rejected"]  # a mismatched one
            write_record(file, record)
        os.fsync(file.fileno())
    model.train()
