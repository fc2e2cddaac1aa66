"""The weights that a run has to have, by its method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bdpo_plugin import BalanceWeights, balance_weights
from bdpo_plugin.settings import BDPOSettings
from benchmarks.safety_world.weighting import control


def weigh(
    method: str,
    settings: BDPOSettings,
    seed: int,
    kinds: Sequence[str],
    mi_chosen: Tensor,
    mi_rejected: Tensor,
) -> BalanceWeights:
    """The package's weights, of the MI as measured or of another pair of the same kind.

    Args:
        method: ``bdpo`` or ``shuffled``.
        settings: of the run.
        seed: of the shuffle, a random cycle of each kind.
        kinds: of each pair, for the shuffle; empty without one.
        mi_chosen, mi_rejected: (B,), of a whole dataset, in the unit of `settings`.
    """
    mi = mi_chosen, mi_rejected
    if method == "shuffled":
        mi = control("within", *mi, [(kind,) for kind in kinds], seed)
    return balance_weights(
        *mi,
        alpha=settings.alpha,
        weighting=settings.weighting,
        balance=settings.balance,
        scaling=settings.scaling,
    )


def kinds_file(output_dir: str) -> Path:
    """Where the control keeps the kind of each pair of its scores, in their order."""
    return Path(output_dir, "bdpo", "kinds.json")
