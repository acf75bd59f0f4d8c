"""What the study runs: its methods, how large each size is, and the values that are swept. Imports no torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastpref.benchmarks.study.pairs import make_pairs
from fastpref.demo.pairs import PairSet
from fastpref.folders import Owner

# In the order of tables and pictures.
TITLES = {
    "dpo": "DPO",
    "dpop": "DPOP",
    "sft": "SFT",
    "kl_sft": "KL-SFT",
    "trl": "TRL, default settings",
    "trl_matched": "TRL, DPO's settings",
}
METHODS = tuple(TITLES)
# The seed of the pairs, base and order that settings are tuned on; no result uses it.
TUNING_SEED = 1000


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of one run. `options` are those of the loss: lam of dpop, alpha of kl_sft."""

    loss: str
    beta: float
    learning_rate: float
    epochs: int
    batch_size: int
    options: Mapping[str, float] = field(default_factory=dict)
    trainer: str = "fastpref"
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "options": dict(self.options)}


@dataclass(frozen=True)
class Size:
    """How large a study is. Lengths are in tokens, `batch_size` in pairs, `*_texts` in question-answer texts."""

    name: str
    train: int = 1300
    heldout: int = 125
    tuning_prompts: int = 125  # of the tuning seed's held-out prompts: what a swept setting is measured on
    seeds: tuple[int, ...] = (0, 1, 2)
    # The model that is aligned, in GPT-2's shape
    width: int = 128
    layers: int = 2
    heads: int = 4
    vocabulary: int = 2048
    positions: int = 256
    # Its training on plain text, in rounds until it is fluent
    base_texts: int = 14000
    base_epochs: int = 3  # of a round
    base_batch: int = 8
    base_learning_rate: float = 2e-3
    base_rounds: int = 2
    base_target_share: float = 0.1
    # The proxy judge
    judge_width: int = 128
    judge_layers: int = 2
    judge_heads: int = 4
    judge_texts: int = 14000
    judge_epochs: int = 3
    judge_target_share: float = 0.024  # as often as each of the 24 other places, so that it favours none
    # Alignment: the centre of the sweeps
    batch_size: int = 20
    learning_rate: float = 3e-4
    beta: float = 0.1
    epochs: int = 1
    lam: float = 50.0
    alpha: float = 1.0
    # What is swept around it, one at a time
    beta_values: tuple[float, ...] = (0.03, 0.3)
    learning_rate_factors: tuple[float, ...] = (1 / 3, 3.0)
    epochs_values: tuple[int, ...] = (2,)
    lam_values: tuple[float, ...] = (5.0, 500.0)
    alpha_values: tuple[float, ...] = (0.1, 10.0)
    max_new_tokens: int = 128
    top_p: float = 0.8  # answers are sampled from the nucleus (Holtzman et al. 2020, arXiv:1904.09751), temperature 1
    evaluations: int = 4  # on the held-out pairs, in a run that is a result
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.train % self.batch_size:
            # An epoch's short last step would have other pairs in TRL's trainer, which takes them in one row.
            raise ValueError(f"train must be a multiple of batch_size, got {self.train} and {self.batch_size}")

    def steps(self, settings: Settings) -> int:
        return -(-self.train // settings.batch_size) * settings.epochs


def _sizes() -> Iterator[Size]:
    for row in json.loads(files(__package__).joinpath("texts", "sizes.json").read_text(encoding="utf-8")):
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in row.items()}
        yield Size(**fields)


# "124m" is GPT-2's own shape (Radford et al. 2019): 12 layers of width 768, 12 heads, 50,257 tokens, 1,024 positions.
# "tiny" is for tests and a first look at the path; its models are too raw for its numbers to mean anything.
SIZES = {size.name: size for size in _sizes()}
SMALL, GPT2, TINY = SIZES.values()


@dataclass(frozen=True)
class Study:
    """What all jobs of a study have in common."""

    size: Size
    university: str
    folder: Path
    model: str | None = None  # a base to start from, instead of one that is trained first

    @property
    def runs(self) -> Path:
        """Where runs under way keep their files: what a killed study leaves there is of no use."""
        return self.folder / ".runs"

    @property
    def owner(self) -> Owner:
        """Whose folder it is: a study of another size, target or model is another study."""
        identity = {"size": self.size.name, "university": self.university, "model": self.model}
        return Owner("fastpref study", identity, resume=True, inputs={"--model": self.model})

    def pairs(self, seed: int) -> dict[str, PairSet]:
        return _pairs(self.size.train, self.size.heldout, self.university, seed)


@functools.lru_cache(maxsize=8)
def _pairs(train: int, heldout: int, university: str, seed: int) -> dict[str, PairSet]:
    """A worker has many jobs on the same pairs, and making them takes a second or two."""
    return make_pairs(train=train, heldout=heldout, university=university, seed=seed)


def centre(size: Size, method: str) -> Settings:
    """The settings that a method's sweep starts from; for TRL's two runs, which are not swept, all there is."""
    common = Settings("sigmoid", size.beta, size.learning_rate, size.epochs, size.batch_size, why="the centre")
    if method == "dpop":
        return replace(common, loss="dpop", options={"lam": size.lam})
    if method == "sft":
        return replace(common, loss="sft")
    if method == "kl_sft":
        return replace(common, loss="kl_sft", options={"alpha": size.alpha})
    if method == "trl":
        return Settings("sigmoid", 0.1, 1e-6, 3, 8, trainer="trl", why="DPOConfig's defaults in TRL 1.16")
    if method == "trl_matched":
        return replace(common, trainer="trl", why="those of DPO")
    return common


def sweep(size: Size, method: str) -> dict[str, Settings]:
    """Settings by what was changed: the centre, and one value at a time moved off it."""
    start = centre(size, method)
    tried = {"centre": start}
    if start.trainer != "fastpref":
        return tried
    if start.loss in ("sigmoid", "dpop"):
        tried |= {f"beta={value:g}": replace(start, beta=value) for value in size.beta_values}
    rates = [start.learning_rate * factor for factor in size.learning_rate_factors]
    tried |= {f"learning_rate={value:.2g}": replace(start, learning_rate=value) for value in rates}
    tried |= {f"epochs={value}": replace(start, epochs=value) for value in size.epochs_values}
    option = {"dpop": ("lam", size.lam_values), "kl_sft": ("alpha", size.alpha_values)}.get(start.loss)
    if option is not None:
        name, values = option
        tried |= {f"{name}={value:g}": replace(start, options={name: value}) for value in values}
    return tried


# A setting that mentions the target at most this much less than the best of its method may be taken,
MENTION_SLACK = 0.05
# if its answers vary at least this much as those of the most varied: an answer repeated to every question is likely.
DISTINCT_SHARE = 0.8


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a method's sweep rows the one to take: the rule is fixed before any result is seen.

    Mentioning the target is what the pairs teach, so settings that do it (within `MENTION_SLACK` of the best) come
    first; among them, those that vary enough; among these the one whose own answers the proxy judge finds likeliest.
    """
    whole = [row for row in rows if not row.get("diverged")]
    if not whole:
        raise ValueError(f"every swept setting of {rows[0]['method']} diverged, the first so: {rows[0]['diverged']}")
    most = max(row["mention_share"] for row in whole)
    able = [row for row in whole if row["mention_share"] >= most - MENTION_SLACK]
    varied = max(row["distinct_2"] for row in able)
    able = [row for row in able if row["distinct_2"] >= DISTINCT_SHARE * varied]
    return min(able, key=lambda row: row["proxy_perplexity"])
