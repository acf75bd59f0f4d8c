"""TRL 1.16: its DPOTrainer with fastpref inside, as a class of its own or by patching TRL's.

from fastpref.integrations.trl import patch_trl
patch_trl()  # and the script goes on as it is
"""

from fastpref.integrations.tested import check_trl

check_trl()  # before anything of TRL is imported that another version may not have

from fastpref.integrations.trl.head import add_fast_head  # noqa: E402
from fastpref.integrations.trl.trainer import (  # noqa: E402
    FastPrefDPOConfig,
    FastPrefDPOTrainer,
    patch_trl,
    unpatch_trl,
)

__all__ = ["FastPrefDPOConfig", "FastPrefDPOTrainer", "add_fast_head", "patch_trl", "unpatch_trl"]
