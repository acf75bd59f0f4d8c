"""The reference's log-probs: computed in one pass before training, kept on disk, and then its model is gone.

A pair's reference log-probs come from the dataset's columns, or from the cache, or from the pass, in this order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastpref.options import UsageError
from fastpref.training.checkpoints.save import ResumeError
from fastpref.training.data.batches import cut
from fastpref.training.data.tokens import Pair
from fastpref.training.distributed.processes import deal
from fastpref.training.memory.oom import explained
from fastpref.training.precision import autocasts
from fastpref.training.reference.cache import (
    CHOSEN,
    REJECTED,
    CacheWriter,
    Found,
    Logps,
    Record,
    differences,
    read_cache,
)
from fastpref.training.reference.key import ReferenceKey, pair_digest, text_digest, tokenizer_digest
from fastpref.training.reference.model import Reference
from fastpref.training.run import Run
from fastpref.training.step import log_probs

# Without backward a batch may be larger than a training micro-batch: so many times the pairs, so many times the tokens.
MORE_PAIRS, MORE_TOKENS = 4, 2


def add_reference(run: Run) -> str | None:
    """Give every pair that the run uses its reference log-probs, if the loss needs them.

    The reference is `config.reference_model`, or the policy with the weights that it has now, which must be the initial
    ones; adapters are off. A run that resumes uses what it stored, from its folder or from its checkpoint's. What is
    gone from there is computed again if the reference is still the one that the run started from.

    Returns:
        The digest of the reference's weights, for a checkpoint; None where no pair needed it.

    Raises:
        ResumeError: log-probs are missing, and the reference is another than the run's.
    """
    config, spec = run.config, run.spec
    if not spec.needs_reference:
        return None
    used = [run.pairs[index] for index in run.plan.used(run.steps)]  # a short run need not wait for all the data
    without = [pair for pair in (*used, *run.eval_pairs) if pair.ref_chosen_logp is None]
    if len(without) < len(used) + len(run.eval_pairs):
        run.console.say(
            f"reference log-probs are taken from the dataset's columns; they must be the {spec.reduction} over a "
            f"response's tokens, as loss {spec.name!r} means it"
        )
    if not without:
        if config.reference_model is not None:
            raise UsageError(
                f"reference_model={config.reference_model!r} would not be used: the dataset has the columns {CHOSEN} "
                f"and {REJECTED}. Leave out one of the two"
            )
        return None
    digests = {id(pair): pair_digest(pair) for pair in without}
    wanted = {digests[id(pair)]: pair for pair in reversed(without)}  # rows that are the same are computed once

    with Reference(run) as reference:
        weights = run.state["initial_weights"] if run.state is not None else reference.digest()
        key = _key(run, weights)
        logps = _stored(run, key, wanted)
        missing = {digest: pair for digest, pair in wanted.items() if digest not in logps}
        if missing:
            if reference.digest() != weights:
                raise ResumeError(
                    f"the reference log-probs of this run are not in {_folder(run)} any more, and the model given is "
                    "not the one it started from: give the initial model, to compute them again"
                )
            with reference.ready() as ready:
                logps |= compute_reference(ready, missing, key=key)

    def complete(pair: Pair) -> Pair:
        if id(pair) not in digests:
            return pair
        chosen, rejected = logps[digests[id(pair)]]
        return dataclasses.replace(pair, ref_chosen_logp=chosen, ref_rejected_logp=rejected)

    run.pairs, run.eval_pairs = [complete(pair) for pair in run.pairs], [complete(pair) for pair in run.eval_pairs]
    return weights


def compute_reference(run: Run, pairs: Mapping[str, Pair], *, key: ReferenceKey) -> dict[str, Logps]:
    """Log-probs of the pairs, by digest, under `run.model` as it is; the processes share the work and its keeping.

    Longest first: little padding, and a batch that does not fit in memory fails at once.
    """
    accelerator = run.accelerator
    digests = sorted(pairs, key=lambda digest: -pairs[digest].length)
    ordered = [pairs[digest] for digest in digests]
    batches = _batches(run, ordered)
    values = torch.zeros(len(ordered), 2, device=accelerator.device)
    writer = CacheWriter(_folder(run), key, process=accelerator.process_index)
    with torch.no_grad(), run.console.bar("reference log-probs", len(ordered), unit="pair") as bar:
        for mine, counts in deal(batches, accelerator):
            chunk = [ordered[index] for index in mine]
            with explained(run, "the reference pass", chunk):
                batch, both = log_probs(run, run.model, chunk)
            found = torch.stack(both, dim=1)  # (P, 2)
            if counts:
                values[mine[0] : mine[-1] + 1] = found
                logps: list[Logps] = [(chosen, rejected) for chosen, rejected in found.tolist()]
                writer.append(map(Record, (digests[index] for index in mine), batch.rows, logps))
            # The other processes do about as much.
            bar.advance(len(chunk) * accelerator.num_processes, tokens=batch.tokens * accelerator.num_processes)
    # Every pair is zero on all processes but the one that computed it.
    reduced = accelerator.reduce(values, "sum").tolist()
    return {digest: (chosen, rejected) for digest, (chosen, rejected) in zip(digests, reduced, strict=True)}


def _batches(run: Run, pairs: Sequence[Pair]) -> list[list[int]]:
    """The pairs, longest first, in batches of MORE_PAIRS and MORE_TOKENS times what the largest micro-batch has."""
    indices, sizes, config = range(len(pairs)), run.layout.sizes(pairs), run.config
    trained = cut(indices, sizes, batch_size=config.batch_size, batch_tokens=config.batch_tokens)
    room = MORE_TOKENS * max(map(sizes.of, trained))
    return cut(indices, sizes, batch_size=MORE_PAIRS * config.batch_size, batch_tokens=room)


def _folder(run: Run) -> Path:
    return Path(run.config.reference_cache or run.output_dir)


def _key(run: Run, weights: str) -> ReferenceKey:
    halved = autocasts(run.config, run.accelerator.device)
    return ReferenceKey(
        weights=weights,
        precision="bf16" if halved else "fp32",
        logps=run.config.logps,
        reduction=run.spec.reduction,
        tokenizer=tokenizer_digest(run.tokenizer),
        template=text_digest(run.tokenizer.chat_template),
        max_length=run.max_length,
    )


def _stored(run: Run, key: ReferenceKey, wanted: Mapping[str, Pair]) -> dict[str, Logps]:
    """What the cache has of the wanted pairs, as the main process sees it; a line says what it has not, and why."""
    values = torch.full((len(wanted), 2), torch.nan)
    if run.accelerator.is_main_process:
        folder, say = _folder(run).resolve(), run.console.say
        found = read_cache(folder, key, wanted, say=say)
        if run.checkpoint is not None and len(found.logps) < len(wanted):
            # A run that goes on in another folder takes with it what it needs.
            source = run.checkpoint.resolve().parent
            more = read_cache(source, key, wanted.keys() - found.logps.keys(), say=say) if source != folder else Found()
            CacheWriter(folder, key, process=0).append(
                Record(digest, wanted[digest].row, logps) for digest, logps in more.logps.items()
            )
            found.logps |= more.logps
            found.same_key += more.same_key
            found.damage += more.damage
        _report(run, key, found, len(wanted))
        values = torch.tensor([found.logps.get(digest, (torch.nan, torch.nan)) for digest in wanted])
    if run.accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        values = broadcast(values.to(run.accelerator.device)).cpu()
    stored = zip(wanted, values.tolist(), strict=True)
    return {digest: (chosen, rejected) for digest, (chosen, rejected) in stored if chosen == chosen}


def _report(run: Run, key: ReferenceKey, found: Found, wanted: int) -> None:
    known, why = len(found.logps), differences(found, key)
    if known == wanted:
        return  # what is damaged or stale is of no matter then
    for line in found.damage:
        run.console.say(line)
    if known:
        also = f"; it was written with {', '.join(why)}" if why else ""
        run.console.say(
            f"reference log-probs: {known} of {wanted} pairs are in the cache, {wanted - known} to compute{also}"
        )
    elif why:
        run.console.say(
            f"reference log-probs are computed: those in {_folder(run)} are of another run, with {', '.join(why)}"
        )
