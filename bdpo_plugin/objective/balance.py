"""Computes the balance weights and the scaling factor of each pair from its mutual information."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Lower bound of each I, in nats, under `power`; method section 5.
POWER_FLOOR = 0.05


class BalanceWeights(NamedTuple):
    """Balance weights and scaling factors of B pairs: each (B,), dimensionless, no gradient."""

    chosen: Tensor
    rejected: Tensor
    scale: Tensor


def balance_weights(
    mi_chosen: Tensor,
    mi_rejected: Tensor,
    *,
    alpha: float = 1.5,
    weighting: str = "softmax",
    balance: bool = True,
    scaling: bool = True,
) -> BalanceWeights:
    """Computes weights that are lower for the response that the reference understands better
    (method sections 5 and 6).

    softmax: w_w = 2 sigmoid(alpha (I_l - I_w)), w_l = 2 - w_w;
    power:   w_w = 2 I_l^alpha / (I_w^alpha + I_l^alpha), w_l = 2 - w_w, each I clamped from
             below at 0.05 nats;
    scale:   s = sqrt(2 / (w_w^2 + w_l^2)), in [1/sqrt(2), 1].

    The computation is in float32 at least. Each weight is its own sigmoid: computed as 2 - w_w, the
    weight of a response that is understood far better would round to 0, and no longer fall as its
    mutual information grows.

    Args:
        mi_chosen: (B,) I(x; y_w), nats or nats per token.
        mi_rejected: (B,) I(x; y_l), in the same unit.
        alpha: strength, finite and >= 0; 0 gives weights and scale of exactly 1.
        weighting: ``softmax`` or ``power``.
        balance: False sets both weights to 1 and keeps the computed scale ("SF only").
        scaling: False sets the scale to 1 ("BW only").

    Raises:
        ValueError: The shapes differ, a mutual information is not finite, alpha is out of range, or
            the weighting is unknown.
    """
    if mi_chosen.shape != mi_rejected.shape or mi_chosen.dim() != 1:
        raise ValueError(
            "mi_chosen and mi_rejected must be two (B,) tensors, got "
            f"{tuple(mi_chosen.shape)} and {tuple(mi_rejected.shape)}"
        )
    dtype = torch.promote_types(mi_chosen.dtype, torch.float32)
    if not 0 <= alpha <= torch.finfo(dtype).max:
        raise ValueError(f"alpha must be finite and >= 0, got {alpha!r}")
    mi_chosen, mi_rejected = mi_chosen.detach().to(dtype), mi_rejected.detach().to(dtype)
    finite = mi_chosen.isfinite() & mi_rejected.isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"the mutual information of pair {row} of the batch is not finite: "
            f"chosen {mi_chosen[row].item()}, rejected {mi_rejected[row].item()}; "
            "the reference gave one of its tokens probability 0, or overflowed"
        )
    if weighting == "softmax":
        advantage = (mi_rejected - mi_chosen).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    elif weighting == "power":
        # a^p / (a^p + b^p) = sigmoid(p (log a - log b)), which neither overflows nor underflows
        floor_chosen = mi_chosen.clamp(min=POWER_FLOOR)
        floor_rejected = mi_rejected.clamp(min=POWER_FLOOR)
        advantage = floor_rejected.log() - floor_chosen.log()
    else:
        raise ValueError(f"unknown weighting {weighting!r}, must be 'softmax' or 'power'")
    chosen = 2 * torch.sigmoid(alpha * advantage)
    rejected = 2 * torch.sigmoid(-alpha * advantage)
    scale = (2 / (chosen**2 + rejected**2)).sqrt()
    one = torch.ones_like(scale)
    return BalanceWeights(
        chosen if balance else one, rejected if balance else one, scale if scaling else one
    )
