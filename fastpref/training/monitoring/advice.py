"""What the loop tells its user in words: each kind of advice once a run, kept in advice.jsonl and in checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from fastpref.losses import LossSpec
from fastpref.training.checkpoints.durable import new_file, writing
from fastpref.training.monitoring.gradients import Norms, explosion
from fastpref.training.monitoring.nonfinite import SeenStep
from fastpref.training.run import Run

ADVICE = "advice.jsonl"
FALLING, EXPLODING = "falling_chosen_reward", "exploding_gradient"

# A fall below these is none worth a word. In nats, since a reward is beta times as much: at beta = 0.01 half a nat
# would be lost in a threshold that suits beta = 0.1. The second is for losses that take the mean over tokens.
LEAST_FALL = {"sum": 0.5, "mean": 0.02}
# Records that are looked at: the latest FEWEST, or one more, and so on to RECENT, because in a short run the mean over
# many still holds how it began. A fall has to last a LASTING-th of the run so far, or RECENT records, or as many as
# hold so many PAIRS.
FEWEST, RECENT, LASTING, PAIRS = 5, 20, 5, 64
# Standard errors that a mean must be away. There are many looks: with nothing but noise around 0, 6 are passed in one
# of 100 runs of 100 records (simulated; normal, skewed, heavy-tailed and growing noise), but in 21 where it lingers
# (autoregressive, 0.5).
ERRORS = 6.0
# Of the noise of earlier records the largest quarter of the squares does not count, so that one bad step does not
# silence the advice for as long as its record is looked at. The others' mean is this share of a normal variance.
COUNTED, OF_NORMAL = 0.75, 0.368
# Of these the chosen log-prob is not what a margin may be bought with: kl_sft raises it and looks at nothing else, and
# apo_down is made to lower both; kto's are of the desirable responses, without a counterpart.
NOT_FOR = ("kl_sft", "apo_down", "kto")
KEPT = ("step", "loss", "rewards/chosen", "rewards/margins")


class Advice(NamedTuple):
    """A line of the loop's advice: after which step, of what kind, and what it said."""

    step: int
    kind: str  # "falling_chosen_reward" or "exploding_gradient"
    text: str


class Adviser:
    """Watches records and gradient norms, and speaks once of each kind: on the console and in advice.jsonl.

    What was said and what it is judged by is part of the checkpoints, so that a resumed run says what one without a
    break would have said. Every process has one and all decide alike.

    Args:
        model: as the loop runs it, wrapped.
    """

    def __init__(self, run: Run, model: Any) -> None:
        self.said: list[Advice] = []
        self._run, self._model = run, model
        self._records: list[dict[str, Any]] = []  # the first and the latest
        self._norms = Norms(run.plan.per_step)

    def state(self) -> dict[str, Any]:
        return {
            "said": [tuple(advice) for advice in self.said],
            "records": self._records,
            "norms": self._norms.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        kept = state["advice"]
        self.said, self._records = said(state), list(kept["records"])
        self._norms.load_state(kept["norms"])

    def _has_said(self, kind: str) -> bool:
        return any(advice.kind == kind for advice in self.said)

    def see_record(self, record: Mapping[str, Any]) -> None:
        """A record of training that was just logged."""
        if all(name in record for name in KEPT):
            self._records.append({name: record[name] for name in KEPT})
            self._records = self._records[:1] + self._records[1:][-PAIRS:]
        if not self._has_said(FALLING):
            config, plan = self._run.config, self._run.plan
            text = falling_chosen_reward(
                self._records, self._run.spec, config.loss_arguments, pairs_per_step=plan.per_step
            )
            self._say(record["step"], FALLING, text)

    def see_steps(self, steps: Sequence[tuple[SeenStep, float, float]], *, measure: bool = True) -> None:
        """Steps, gradient norms and mean losses in order, the last just made, with no gradients held any more.

        With `measure` False (the weights are not to be trusted any more) no row's gradient is measured.
        """
        for step, norm, loss in steps:
            usual = self._norms.see(norm, loss)
            if usual is not None and not self._has_said(EXPLODING):
                now = steps[-1][0].step if measure else None
                self._say(step.step, EXPLODING, explosion(self._run, self._model, step, norm, usual, now=now))

    def _say(self, step: int, kind: str, text: str | None) -> None:
        if text is None:
            return
        self.said.append(Advice(step, kind, text))
        self._run.console.say(f"advice: {text}")
        self.write()

    def write(self) -> None:
        """Make advice.jsonl what has been said."""
        path = self._run.output_dir / ADVICE
        if not self._run.accelerator.is_main_process or not (self.said or path.exists()):
            return
        with writing(path):
            if not self.said:  # it is of steps that will be made again
                path.unlink()
                return
            with new_file(path) as new:  # whole: at most a line of each kind
                lines = (json.dumps(advice._asdict(), ensure_ascii=False) + "\n" for advice in self.said)
                new.write_text("".join(lines), encoding="utf-8")


def said(state: Mapping[str, Any] | None) -> list[Advice]:
    """The advice that a checkpoint knows of."""
    return [] if state is None else [Advice(*line) for line in state["advice"]["said"]]


def falling_chosen_reward(
    records: Sequence[Mapping[str, Any]],
    spec: LossSpec,
    arguments: Mapping[str, Any],
    *,
    pairs_per_step: int,
) -> str | None:
    """Advice if the mean chosen reward has gone below zero and stays there while the loss is below the first one.

    Held-out records do not count: there the chosen log-prob also falls where a model overfits, in SFT as well, and
    other things help against that.

    Args:
        records: of training, the first of the run and the latest.
        arguments: the loss's, with beta.
    """
    recent, fewest = _recent(records, pairs_per_step)
    if not recent or not spec.needs_reference or spec.name in NOT_FOR:
        return None
    beta, least = arguments["beta"], LEAST_FALL[spec.reduction]
    nats = [record["rewards/chosen"] / beta for record in recent]
    losses = [record["loss"] for record in recent]
    margins = [record["rewards/margins"] for record in recent]

    def fallen(count: int) -> bool:
        below = _bound(nats, count) < 0 and _mean(nats[-count:]) < -least
        stays = _mean(nats[-count:][count // 2 :]) < -least
        return below and stays and _bound(losses, count) < records[0]["loss"] and _mean(margins[-count:]) > 0

    count = next((count for count in range(fewest, len(recent) + 1) if fallen(count)), None)
    if count is None:
        return None
    lost = -_mean(nats[-count:])
    remedies = ["a larger lam in loss_options" if spec.name == "dpop" else "loss=dpop"]
    if any(option.name == "margin_clip" for option in spec.options):
        remedies.append(f"{'margin_clip' if arguments.get('margin_clip') is None else 'a smaller margin_clip'} in "
                        "loss_options")  # fmt: skip
    first, last = recent[-count]["step"], recent[-1]["step"]
    return (
        f"the loss falls, but so does the log-prob of the chosen responses: by {lost:.3g} nats "
        f"{'a token' if spec.reduction == 'mean' else 'each'} against the reference in the records of steps {first} to "
        f"{last} (reward {-beta * lost:.3g}). The margin grows by making both responses less likely. "
        f"Remedies: {', '.join(remedies)}, a smaller beta or a smaller learning_rate."
    )


def _recent(records: Sequence[Mapping[str, Any]], pairs_per_step: int) -> tuple[Sequence[Mapping[str, Any]], int]:
    """The latest records, without the first of all, and how many of them are the fewest to go by.

    None of them while there are too few, or too few pairs in them.
    """
    later = records[1:]
    if len(later) < FEWEST:
        return [], FEWEST
    per_record = pairs_per_step * (later[-1]["step"] - later[0]["step"]) / (len(later) - 1)
    in_all = (later[-1]["step"] - records[0]["step"]) * (len(later) - 1) / (later[-1]["step"] - later[0]["step"])
    fewest = max(FEWEST, min(RECENT, math.ceil(in_all / LASTING)), math.ceil(PAIRS / per_record))
    return (later[-max(RECENT, fewest) :] if len(later) >= fewest else []), fewest


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _bound(values: Sequence[float], count: int) -> float:
    """What the mean of the latest values is below, noise considered: theirs, or what is usual if that is larger."""
    latest = values[-count:]
    squares = sorted(_squares(values))
    usual = _mean(squares[: math.ceil(COUNTED * len(squares))]) / OF_NORMAL
    return _mean(latest) + ERRORS * math.sqrt(max(usual, _mean(_squares(latest))) / 2 / count)


def _squares(values: Sequence[float]) -> list[float]:
    """Squared differences of neighbours, whose mean is twice the variance of noise: a trend is no noise."""
    return [(after - before) ** 2 for before, after in pairwise(values)]
