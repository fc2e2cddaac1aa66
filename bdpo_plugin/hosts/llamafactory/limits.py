"""The table of LLaMA-Factory's options that B-DPO cannot honour."""

from __future__ import annotations

from bdpo_plugin.limits import Limit
from bdpo_plugin.settings import BDPOError

#: LLaMA-Factory's arguments that B-DPO cannot honour.
LIMITS = (
    Limit("pref_bco_weight", "the BCO loss has no place for the balance weights"),
    Limit("dpo_label_smoothing", "LLaMA-Factory's smoothed loss is none that B-DPO balances"),
    Limit(
        "ld_alpha", "it would weight the tokens that the mutual information is measured on", (1,)
    ),
)


def check_trainer() -> None:
    """Raises BDPOError if the run would not use our trainer.

    With TRL 0.24, LLaMA-Factory's own trainer trains `sigmoid` whatever `pref_loss` says.
    """
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    if not hasattr(CustomDPOTrainer, "__wrapped__"):
        raise BDPOError(
            "This run asked for B-DPO, but its trainer is not active: see the warning that B-DPO "
            "could not hook into its host. Nothing has been trained. Reinstall bdpo-plugin."
        )
