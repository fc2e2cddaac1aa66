"""Computes the loss of each pair of a batch from its log-probabilities and balance weights. The
training step calls it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdpo_plugin.objective.balance import BalanceWeights
from bdpo_plugin.settings import PAIR_LOSSES


class ChosenRejected(NamedTuple):
    """A value of each response of B pairs: (B,) of the chosen ones, (B,) of the rejected ones."""

    chosen: Tensor
    rejected: Tensor


def bdpo_loss(
    policy: ChosenRejected,
    reference: ChosenRejected,
    weights: BalanceWeights,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: ChosenRejected | None = None,
) -> Tensor:
    """Computes the B-DPO loss of each pair (method section 7).

    r_w = s w_w log[pi(y_w|x) / pi_ref(y_w|x)], r_l likewise, h = r_w - r_l; then

    sigmoid: -log sigmoid(beta h)
    hinge:   max(0, 1 - beta h)
    ipo:     (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2
    robust:  (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)

    with e = `label_smoothing`, which only `robust` reads, as in TRL. If all weights are 1, each
    loss is that of TRL.

    Args:
        policy: log pi_theta(y|x), nats, summed over the tokens of the response.
        reference: log pi_ref(y|x), nats, summed.
        weights: the weights of the same B pairs; constants, as are the log-probabilities of the
            reference.
        beta: how strongly the policy is tied to the reference; for `ipo` its tau.
        loss_type: one of the four names above.
        label_smoothing: e, in [0, 0.5); read by `robust` only.
        lengths: numbers of response tokens. Only `ipo` reads them; without them it takes the
            log-probabilities as per-token averages.

    Returns:
        (B,) the loss of each pair. Only the log-probabilities of the policy get a gradient.

    Raises:
        ValueError: The shapes differ, the loss type is unknown, or `label_smoothing` is outside
            [0, 0.5) for `robust`.
    """
    given = {"policy": policy, "reference": reference, "weights": weights, "lengths": lengths}
    shapes = {
        f"{name}.{part}": tuple(tensor.shape)
        for name, tensors in given.items()
        if tensors is not None
        for part, tensor in tensors._asdict().items()
    }
    if len(set(shapes.values())) != 1 or policy.chosen.dim() != 1:
        raise ValueError(f"every tensor must be (B,), got {shapes}")
    if loss_type not in PAIR_LOSSES:
        raise ValueError(f"unknown loss type {loss_type!r}, must be one of {PAIR_LOSSES}")
    if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5) for robust, got {label_smoothing!r}")
    weight_chosen, weight_rejected, scale = (weight.detach() for weight in weights)
    chosen = scale * weight_chosen * (policy.chosen - reference.chosen.detach())
    rejected = scale * weight_rejected * (policy.rejected - reference.rejected.detach())
    if loss_type == "ipo":
        if lengths is not None:
            chosen, rejected = chosen / lengths.chosen, rejected / lengths.rejected
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    logits = beta * (chosen - rejected)
    if loss_type == "hinge":
        return torch.relu(1 - logits)
    if loss_type == "robust":
        clean = -(1 - label_smoothing) * F.logsigmoid(logits)
        flipped = -label_smoothing * F.logsigmoid(-logits)
        return (clean - flipped) / (1 - 2 * label_smoothing)
    return -F.logsigmoid(logits)
