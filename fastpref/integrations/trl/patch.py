"""patch_trl: scripts that use `trl.DPOTrainer` get what `FastPrefDPOTrainer` does, without being changed."""

from __future__ import annotations

import functools
import types
from typing import Any

from trl import DPOTrainer

from fastpref.integrations.trl.losses import compute_loss
from fastpref.integrations.trl.trainer import FastPrefDPOTrainer, fast_heads
from fastpref.integrations.trl.version import check_trl

_METHODS = ("__init__", "_compute_loss")
_originals: dict[str, Any] = {}  # of a class that is patched


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
