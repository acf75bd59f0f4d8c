"""Gradients that explode: whether a step's norm is far beyond what the run has shown, and which rows did it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median, pstdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.losses import coefficients
from fastpref.training.data.tokens import Pair
from fastpref.training.distributed.processes import backward, is_sharded
from fastpref.training.memory.oom import out_of_memory
from fastpref.training.monitoring.nonfinite import SeenStep
from fastpref.training.run import Run
from fastpref.training.step import log_probs, reference_logps

# A norm explodes where it is FACTOR times what is usual and BEYOND times what has been. Where the step's loss is not
# above the first step's it must also be SATURATED times what has been, or UNLIKE: so many standard deviations from the
# usual, in logarithms. Healthy runs of small models: DPO's norms fall to a hundredth as margins saturate, and then a
# hard pair's is 9 times the usual (steps of 4 pairs), but at most 2.2 times what had been. DPOP's grow 50 times
# wherever a chosen response falls; where few do (low edit distance, steps of 4 and more) they are up to 270 times the
# usual and 8.4 times what had been, with losses far below the first (one of 34 and 3.9 times was 1.3 deviations away).
# A page of replacement characters in a step of 20 gave 30 to 200 times the usual, 18 to 100 times what had been, and 6
# to 16 deviations (six runs).
FACTOR, BEYOND, SATURATED, UNLIKE = 10.0, 3.0, 30.0, 5.0
# Norms whose medians are the usual; before as many as FIRST were seen, of PAIRS pairs at least, none explodes: with
# single pairs two healthy runs of DPOP had a norm of 131 and 157 times the usual by step 11 and 22, and none after.
FIRST, PAIRS, RECENT = 10, 40, 50
GROWING = 10  # the latest norms are not yet what has been: an explosion may take some steps
SHOWN, MEASURED = 5, 64  # rows
LONG = 3.0  # times the median pair: a row that max_length could shorten


class Norms:
    """The gradient norms of a run, and the mean loss of its first step."""

    def __init__(self, pairs_per_step: int) -> None:
        self._beginning = max(FIRST, math.ceil(PAIRS / pairs_per_step))
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._largest = 0.0  # of those after the first and before the latest
        self._start: float | None = None  # the loss

    def see(self, norm: float, loss: float) -> float | None:
        """Take in the next step's norm and mean loss; the usual norm if this one is far beyond it."""
        self._start = loss if self._start is None else self._start
        usual = self._usual() if self._explodes(norm, higher=loss > self._start) else None
        if len(self._first) < self._beginning:
            self._first.append(norm)
        else:
            self._recent.append(norm)
            if len(self._recent) > GROWING:
                self._largest = max(self._largest, self._recent[-GROWING - 1])
        return usual

    def _usual(self) -> float:
        # Where norms fall, what was normal once is not an explosion now; where they rise slowly, no news either.
        return max(median(norms) for norms in (self._first, self._recent) if norms)

    def _explodes(self, norm: float, *, higher: bool) -> bool:
        # Where most steps have no gradient at all, any is as good as another.
        if len(self._first) < self._beginning or not norm > FACTOR * self._usual() > 0:
            return False
        # The largest of the first does not count: it may be the row that is to be found when it comes again.
        been = max(self._largest, sorted(self._first)[-2:][0])
        return norm > BEYOND * been and (higher or norm > SATURATED * been or self._deviations(norm) > UNLIKE)

    def _deviations(self, norm: float) -> float:
        logs = [math.log(seen) for seen in (*self._first, *self._recent) if seen > 0]
        spread = pstdev(logs)
        return math.log(norm / self._usual()) / spread if spread > 0 else math.inf

    def state(self) -> dict[str, Any]:
        return {**vars(self), "_recent": list(self._recent)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        vars(self).update({**state, "_recent": deque(state["_recent"], maxlen=RECENT)})


class _Row(NamedTuple):
    row: int
    loss: float
    logps: list[float]  # of chosen and rejected, or of the response of an unpaired row
    norm: float | None = None


def explosion(run: Run, model: Any, step: SeenStep, norm: float, usual: float, *, now: int | None) -> str:
    """What is said of a step: its norm, the usual one, what became of it, its rows, what to change.

    Every process calls it. Rows are measured where one process holds the model; else they are listed by their losses.

    Args:
        now: the last step whose update the weights have had; None if they are not to be measured with.
    """
    pairs = {pair.row: pair for pair in (run.pairs[index] for index in run.plan.step(step.step - 1))}
    values = torch.cat(step.values, dim=1)  # (3, P), or (2, P) of unpaired data
    rows = [_Row(row, loss, logps) for row, (loss, *logps) in zip(step.rows, values.T.tolist(), strict=True)]
    several = run.accelerator.num_processes > 1
    if several:
        from accelerate.utils import gather_object

        # A process without a pair of its own ran another's.
        rows = list({row[0]: _Row(*row) for row in gather_object(rows)}.values())
    if now is None:
        how = "a later step is not finite"
    elif run.spec.unpaired:
        how = "the loss is of unpaired data"
    elif several or is_sharded(run.accelerator):
        how = "the run has several processes" if several else "the model is sharded"
    else:
        rows, how = _measure(run, model, rows, values, pairs)
    if rows[0].norm is not None:
        rows = sorted(rows, key=lambda row: -(row.norm or 0.0))
        after = "that update" if now == step.step else f"the update of step {now}"
        which = (
            f"with the largest gradients of their own, {how}each measured alone with the step's loss derivatives and "
            f"the weights after {after}"
        )
    elif run.spec.separable:
        rows = sorted(rows, key=lambda row: -row.loss)
        which = f"with the largest losses (their gradients were not measured: {how})"
    else:  # no loss belongs to a pair
        rows = sorted(rows, key=lambda row: -pairs[row.row].length)
        which = f"that are longest (their gradients were not measured: {how})"
    listed = "; ".join(_describe(run, row, pairs[row.row]) for row in rows[:SHOWN])
    return (
        f"the gradient of step {step.step} had the norm {norm:.3g}, {norm / usual:.3g} times the usual "
        f"{usual:.3g}, {_clipped(run, norm)}. The rows of that step (which takes the mean over {len(pairs)}) {which}: "
        f"{listed}. Look at these rows; what helps besides: {_remedies(run, pairs[rows[0].row])}."
    )


def _measure(
    run: Run,
    model: Any,
    rows: list[_Row],
    values: Tensor,  # (3, P): losses and log-probs
    pairs: Mapping[int, Pair],
) -> tuple[list[_Row], str]:
    """Rows with the norms of their own gradients and how they were picked; or without, and why not.

    The gradient of a row's log-probs, weighed as its step's loss did: after the update a sigmoid may have saturated. So
    a loss that compares pairs has a gradient for each of them too.
    """
    places = _picked(rows, pairs)
    chosen = [pairs[rows[place].row] for place in places]
    batch = run.collate([pairs[row.row] for row in rows])
    policy, reference = (values[1], values[2]), reference_logps(batch, run.spec)
    options: Any = {"beta": run.config.beta, "tokens": batch.scored_tokens, **run.config.options_of_loss}
    _, *weights = coefficients(run.spec, *policy, *reference, **options)  # each (P,)
    try:
        norms = _norms_alone(run, model, chosen, torch.stack(weights)[:, places])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the trial's tensors
        return rows, "memory did not suffice"
    of = "" if len(places) == len(rows) else f"of {len(places)} rows (half by loss, half by length) "
    return [rows[place]._replace(norm=norm) for place, norm in zip(places, norms, strict=True)], of


def _picked(rows: Sequence[_Row], pairs: Mapping[int, Pair]) -> list[int]:
    """Places of the rows to measure: all, or half of them by loss and half by length."""
    by_loss = sorted(range(len(rows)), key=lambda place: -rows[place].loss)
    picked, rest = by_loss[: MEASURED // 2], by_loss[MEASURED // 2 :]
    return picked + sorted(rest, key=lambda place: -pairs[rows[place].row].length)[: MEASURED - len(picked)]


def _norms_alone(
    run: Run,
    model: Any,
    pairs: Sequence[Pair],
    weights: Tensor,  # (2, P): of the chosen and the rejected log-prob
) -> list[float]:
    """The norm of each pair's gradient; the run goes on as if nothing had been here: no gradient, no random number."""
    device = run.accelerator.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for place, pair in enumerate(pairs):
                _, policy = log_probs(run, model, [pair])
                backward(run.accelerator, model, (torch.stack(policy) * weights[:, place, None]).sum())
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
                for parameter in trained:
                    parameter.grad = None
        finally:
            for parameter in trained:
                parameter.grad = None
    return torch.stack(norms).tolist()


def _clipped(run: Run, norm: float) -> str:
    limit = run.config.max_grad_norm
    if not limit:
        return "and was not clipped (max_grad_norm=0)"
    return f"and was clipped to max_grad_norm={limit:g}" if norm > limit else f"and below max_grad_norm={limit:g}"


def _describe(run: Run, row: _Row, pair: Pair) -> str:
    norm = "" if row.norm is None else f"norm {row.norm:.3g}, "
    loss = f"loss {row.loss:.3g}, " if run.spec.separable else ""
    lengths = [len(response.ids) - response.start for response in (pair.chosen, pair.rejected)]
    if run.spec.unpaired:
        return f"row {row.row}: {loss}log-prob {row.logps[0]:.4g}, {lengths[0]} tokens"
    return (
        f"row {row.row}: {norm}{loss}log-probs of chosen and rejected {row.logps[0]:.4g} and {row.logps[1]:.4g}, "
        f"{lengths[0]} and {lengths[1]} tokens"
    )


def _remedies(run: Run, worst: Pair) -> str:
    clip = f"a smaller max_grad_norm (now {run.config.max_grad_norm:g})" if run.config.max_grad_norm else (
        "max_grad_norm (now 0, which clips nothing)")  # fmt: skip
    usual = median(pair.length for pair in run.pairs)
    long = f", a smaller max_length (row {worst.row} has {worst.length:,} tokens with its prompt, the median row "
    return f"a lower learning_rate, more warmup_steps, {clip}" + (
        f"{long}{usual:,.0f})" if worst.length > LONG * usual else ""
    )
