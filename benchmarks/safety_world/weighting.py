"""Methods by name: readings of the paper, their ablations and controls, as `balance` callables.

A method is ``dpo``, or ``READING:VARIANT``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bdpo_plugin import BalanceWeights, balance_weights
from bdpo_plugin.trainer import step

#: Reading -> the package's keys of it; PLAN.md has what each means.
READINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "outside": {},
    "ratio": {},
    "power": {"bdpo_weighting": "power"},
    "summed": {"bdpo_mi_normalize": False},
    "expected": {"bdpo_mi_estimator": "expected"},
    "marginal": {},
}
ABLATIONS = ("bw", "sf", "both")
CONTROLS = ("shuffled", "within", "swapped", "random", "constant")

Balance = Callable[[Tensor, Tensor], BalanceWeights]
Groups = Sequence[Hashable]


def keys(method: str, alpha: float) -> dict[str, Any]:
    """The ``bdpo_*`` keys of a method."""
    reading, variant = method.split(":")
    return {
        "bdpo_alpha": alpha,
        "bdpo_balance": variant != "sf",
        "bdpo_scaling": variant != "bw",
        **READINGS[reading],
    }


def balance(
    method: str,
    alpha: float,
    groups: Groups,
    seed: int,
    marginal: tuple[Tensor, Tensor] | None = None,
) -> Balance | None:
    """What takes the place of the package's weights; None where these are what is wanted.

    Args:
        groups: the types of each pair, in the order of the dataset.
        seed: of a control's random numbers.
        marginal: the MI of each pair, for the reading of that name.
    """
    reading, variant = method.split(":")
    if variant in ABLATIONS and reading not in ("ratio", "marginal"):
        return None

    def weigh(mi_chosen: Tensor, mi_rejected: Tensor) -> BalanceWeights:
        if len(groups) != len(mi_chosen):
            raise ValueError(f"{len(mi_chosen)} pairs were scored, {len(groups)} were given")
        mi = marginal if reading == "marginal" else (mi_chosen, mi_rejected)
        mi = control(variant, *mi, groups, seed)
        weights = _weights(reading, variant, *mi, alpha)
        if variant == "constant":
            return BalanceWeights(*(w.mean().expand_as(w) for w in weights))
        return weights

    return weigh


def control(
    variant: str, mi_chosen: Tensor, mi_rejected: Tensor, groups: Groups, seed: int
) -> tuple[Tensor, Tensor]:
    """The MI of a control from the MI as measured; for other variants, the same."""
    generator = torch.Generator().manual_seed(seed)
    if variant == "swapped":
        return mi_rejected, mi_chosen
    if variant == "random":  # differences of the same spread, favouring neither side
        spread = (mi_chosen - mi_rejected).std()
        drawn = torch.randn(len(mi_chosen), generator=generator) * spread
        return drawn, torch.zeros_like(drawn)
    if variant in ("shuffled", "within"):
        of = [group if variant == "within" else None for group in groups]
        order = torch.arange(len(of))
        for group in dict.fromkeys(of):
            members = torch.tensor([i for i, other in enumerate(of) if other == group])
            order[members] = members[torch.randperm(len(members), generator=generator)]
        return mi_chosen[order], mi_rejected[order]
    return mi_chosen, mi_rejected


def _weights(
    reading: str, variant: str, mi_chosen: Tensor, mi_rejected: Tensor, alpha: float
) -> BalanceWeights:
    on = {"balance": variant != "sf", "scaling": variant != "bw"}
    if reading != "ratio":
        weighting = "power" if reading == "power" else "softmax"
        return balance_weights(mi_chosen, mi_rejected, alpha=alpha, weighting=weighting, **on)
    # I_l / (I_w + I_l) and I_w / (I_w + I_l), floored as `power` is; the scale is alpha
    halves = balance_weights(mi_chosen, mi_rejected, alpha=1.0, weighting="power", scaling=False)
    one = torch.ones_like(halves.scale)
    sides = (halves.chosen / 2, halves.rejected / 2) if on["balance"] else (one, one)
    return BalanceWeights(*sides, alpha * one if on["scaling"] else one)


@contextmanager
def loss_of(method: str) -> Iterator[None]:
    """Under the reading ``outside`` the scale weighs the pair's loss, not what is in it.

    The one reading that the `balance` argument cannot express: the step's loss is replaced.
    """
    if not method.startswith("outside:"):
        yield
        return
    inside = step.bdpo_loss

    def outside(*logps_and_weights: Any, **options: Any) -> Tensor:
        *logps, weights = logps_and_weights
        bare = weights._replace(scale=torch.ones_like(weights.scale))
        return weights.scale * inside(*logps, bare, **options)

    with patch.object(step, "bdpo_loss", outside):
        yield
