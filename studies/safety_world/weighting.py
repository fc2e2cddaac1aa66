"""Methods by name: readings of the paper, their ablations and controls, as `weigh` callables.

A method is ``dpo``, or ``READING:VARIANT``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bdpo_plugin import BalanceWeights, balance_weights, bdpo_loss

#: The package's defaults of 2026-11-24, under which "ours" stays what it was.
_OURS = {
    "bdpo_weighting": "softmax",
    "bdpo_mi_estimator": "pointwise",
    "bdpo_mi_normalize": True,
}
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
#: Of each pair: the kind of its query, the types of its chosen and its rejected response.
Types = Sequence[tuple[str, str, str]]


def keys(method: str, alpha: float) -> dict[str, Any]:
    """The ``bdpo_*`` keys of a method."""
    reading, variant = method.split(":")
    return {
        "bdpo_alpha": alpha,
        "bdpo_balance": variant != "sf",
        "bdpo_scaling": variant != "bw",
        **_OURS,
        **READINGS[reading],
    }


def balance(
    method: str,
    alpha: float,
    types: Types,
    seed: int,
    marginal: tuple[Tensor, Tensor] | None = None,
) -> Balance | None:
    """What takes the place of the package's weights; None where these are what is wanted.

    Args:
        types: of each pair, in the order of the dataset.
        seed: of a control's random numbers.
        marginal: the MI of each pair, for the reading of that name.
    """
    reading, variant = method.split(":")
    if variant in ABLATIONS and reading not in ("ratio", "marginal"):
        return None

    def weigh(mi_chosen: Tensor, mi_rejected: Tensor) -> BalanceWeights:
        if len(types) != len(mi_chosen):
            raise ValueError(f"{len(mi_chosen)} pairs were scored, {len(types)} were given")
        mi = marginal if reading == "marginal" else (mi_chosen, mi_rejected)
        mi = control(variant, *mi, types, seed)
        weights = _weights(reading, variant, *mi, alpha)
        if variant == "constant":
            return BalanceWeights(*(w.mean().expand_as(w) for w in weights))
        return weights

    return weigh


def control(
    variant: str, mi_chosen: Tensor, mi_rejected: Tensor, types: Types, seed: int
) -> tuple[Tensor, Tensor]:
    """The MI of a control from the MI as measured; for other variants, the same."""
    if variant == "swapped":
        return mi_rejected, mi_chosen
    generator = torch.Generator().manual_seed(seed)
    if variant == "random":  # differences as large in the mean square, favouring neither side
        spread = (mi_chosen - mi_rejected).square().mean().sqrt()
        drawn = torch.randn(len(mi_chosen), generator=generator) * spread
        return drawn, torch.zeros_like(drawn)
    if variant in ("shuffled", "within"):
        order = shuffle(variant, types, seed)
        return mi_chosen[order], mi_rejected[order]
    return mi_chosen, mi_rejected


def shuffle(variant: str, types: Types, seed: int) -> Tensor:
    """(B,) for each pair the place of the one whose MI it gets: a random cycle of each group.

    Under ``shuffled`` all pairs are one group, under ``within`` those of the same types. A pair
    that is alone in its group is put with those alone whose query is as harmful and whose
    responses have its types; then with those whose responses are refusals as its are; then with
    any.
    """

    def harmful(of: tuple[str, ...]) -> bool:
        return of[:1] == ("harmful",)

    def refusals(of: tuple[str, ...]) -> tuple[bool, ...]:
        return tuple(response in ("tailored", "generic") for response in of[1:])

    generator = torch.Generator().manual_seed(seed)
    order, alone = torch.arange(len(types)), list(range(len(types)))
    for group_of in (
        lambda of: of if variant == "within" else (),
        lambda of: (harmful(of), *of[1:]),
        lambda of: (harmful(of), *refusals(of)),
        lambda of: (),
    ):
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i in alone:
            groups[group_of(types[i])].append(i)
        alone = [members[0] for members in groups.values() if len(members) == 1]
        for members in map(torch.tensor, groups.values()):
            cycle = members[torch.randperm(len(members), generator=generator)]
            order[cycle] = cycle.roll(1)
    return order


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


def outside(*logps_and_weights: Any, **options: Any) -> Tensor:
    """The loss of each pair in the reading ``outside``, which no `weigh` can express.

    The scale weighs the pair's loss, not what is in it. Arguments and result are those of
    :func:`bdpo_plugin.bdpo_loss`.
    """
    *logps, weights = logps_and_weights
    bare = weights._replace(scale=torch.ones_like(weights.scale))
    return weights.scale * bdpo_loss(*logps, bare, **options)
