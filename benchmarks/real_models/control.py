"""The weights that a run has to have, by its method."""

from __future__ import annotations

from torch import Tensor

from bdpo_plugin import BalanceWeights, balance_weights
from bdpo_plugin.settings import BDPOSettings
from benchmarks.safety_world.weighting import control


def weigh(
    method: str, settings: BDPOSettings, seed: int, mi_chosen: Tensor, mi_rejected: Tensor
) -> BalanceWeights:
    """The package's weights, of the MI as measured or shuffled across the pairs.

    Args:
        method: ``bdpo`` or ``shuffled``.
        settings: of the run.
        seed: of the shuffle.
        mi_chosen, mi_rejected: (B,), of a whole dataset, in the unit of `settings`.
    """
    groups = [None] * len(mi_chosen)
    return balance_weights(
        *control(method, mi_chosen, mi_rejected, groups, seed),
        alpha=settings.alpha,
        weighting=settings.weighting,
        balance=settings.balance,
        scaling=settings.scaling,
    )
