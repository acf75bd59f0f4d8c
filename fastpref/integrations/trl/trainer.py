"""TRL's DPOTrainer with fastpref inside: what is built with fast heads, and what is added to its loss types.

Of TRL's trainer only two methods are touched: models are built with `add_fast_head` in place of `add_fused_lm_head`,
and `_compute_loss` adds what `dpop` and `cdpo` are. All else is TRL's own code, so that its losses, metrics and options
are what they are there.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from fastpref.checks import check_choice
from fastpref.integrations.tested import check_trl
from fastpref.integrations.trl.head import LAYOUTS, FastHead, add_fast_head
from fastpref.integrations.trl.losses import OURS, compute_loss, loss_options
from fastpref.losses import get_loss

DEFAULT_LAMBDA: Any = next(option.default for option in get_loss("dpop").options if option.name == "lam")

_building = threading.RLock()
_METHODS = ("__init__", "_compute_loss")
_originals: dict[str, Any] = {}  # of a class that is patched


@dataclass
class FastPrefDPOConfig(DPOConfig):
    """TRL's DPOConfig, and fastpref's options. `loss_type` may hold `dpop` and `cdpo` (its ε is `label_smoothing`)."""

    dpop_lambda: float = field(
        default=DEFAULT_LAMBDA, metadata={"help": "λ of dpop, the weight of a fall of the chosen log-prob; 0 is DPO"}
    )
    layout: str = field(
        default="shared",
        metadata={
            "help": "`shared` puts a batch into one row, each pair's prompt once, where the model allows it; `padded` "
            "leaves rows as they are",
            "choices": LAYOUTS,
        },
    )

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, LAYOUTS)
        get_loss("dpop").check_options({"lam": self.dpop_lambda})
        super().__post_init__()


class FastPrefDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer, with its arguments: the same losses and metrics, computed faster and in less memory.

    `args` may be a `FastPrefDPOConfig` or a plain `DPOConfig`; with either, `loss_type` may hold `dpop` and `cdpo` too,
    alone or in a mix with `loss_weights`. dpop logs `dpop/penalty` and `dpop/active_frac`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with fast_heads(self):
            super().__init__(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        return compute_loss(self, super()._compute_loss, model, inputs, return_outputs)


@contextmanager
def fast_heads(trainer: Any) -> Iterator[None]:
    """While a trainer is built in this thread, its models get our head; TRL takes its own from a global of its module.

    Afterwards is too late: reference log-probs that are computed in advance are computed while it is built.
    """
    here = threading.get_ident()
    heads: list[FastHead] = []

    def add(model: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != here:  # another thread builds a trainer of TRL's
            original(model, *args, **kwargs)
            return
        for name in set(OURS) & set(trainer.loss_types):
            loss_options(trainer, name)
        # A router's auxiliary loss is about all positions, those of padding apart: a shared prompt counts twice.
        layout = "padded" if trainer.aux_loss_enabled else getattr(trainer.args, "layout", "shared")
        add_fast_head(model, *args, layout=layout, max_length=trainer.args.max_length, **kwargs)
        heads.append(model.fastpref_heads[-1])

    with _building:
        original = dpo_trainer.add_fused_lm_head
        dpo_trainer.add_fused_lm_head = add
        try:
            yield
        finally:
            dpo_trainer.add_fused_lm_head = original
    own = _OwnAttention(heads)
    own.restore()  # reference log-probs may have been computed
    trainer.add_callback(own)


class _OwnAttention(TrainerCallback):
    """After training and evaluation its models have the attention that they came with."""

    def __init__(self, heads: list[FastHead]) -> None:
        self.heads = heads

    def restore(self, *args: Any, **kwargs: Any) -> None:
        for head in self.heads:
            head.restore_attention()

    on_train_end = on_evaluate = on_predict = restore


def patch_trl() -> None:
    """Make `trl.DPOTrainer` compute as `FastPrefDPOTrainer` does, wherever it was imported, until `unpatch_trl`.

    The class itself is patched, and with it those derived from it. Trainers made meanwhile stay as they were made.
    Patching twice is patching once.

    Raises:
        ImportError: TRL is outside the tested range; nothing is patched then.
    """
    check_trl()
    if _originals:
        return
    _originals.update((name, vars(DPOTrainer)[name]) for name in _METHODS)
    theirs_init, theirs_loss = (_originals[name] for name in _METHODS)

    @functools.wraps(theirs_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self, FastPrefDPOTrainer):  # which does all this itself
            theirs_init(self, *args, **kwargs)
            return
        with fast_heads(self):
            theirs_init(self, *args, **kwargs)
        if type(self)._compute_loss is loss:  # its own, for when the class is TRL's again
            self._compute_loss = types.MethodType(loss, self)

    @functools.wraps(theirs_loss)
    def loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        theirs = functools.partial(theirs_loss, self)
        if isinstance(self, FastPrefDPOTrainer):
            return theirs(model, inputs, return_outputs)
        return compute_loss(self, theirs, model, inputs, return_outputs)

    for name, method in zip(_METHODS, (init, loss), strict=True):
        setattr(DPOTrainer, name, method)


def unpatch_trl() -> None:
    """Give `trl.DPOTrainer` its own methods back; without a patch, nothing."""
    for name, method in _originals.items():
        setattr(DPOTrainer, name, method)
    _originals.clear()
