"""Computes the mutual information of a response and its query from log-probabilities with and
without the query (method section 3). The reference pass calls it."""

from __future__ import annotations

import torch
from torch import Tensor


def mutual_information(
    cond_logps: Tensor, null_logps: Tensor, lengths: Tensor, *, normalize: bool = True
) -> Tensor:
    """Computes the pointwise mutual information I(x; y) = log pi_ref(y | x) - log pi_ref(y | x0)
    (method section 3).

    Args:
        cond_logps: (B,) log pi_ref(y | x), nats, summed over the response tokens.
        null_logps: (B,) log pi_ref(y | x0), nats, of the same tokens after the null prompt x0.
        lengths: (B,) number of response tokens |y|, each >= 1.
        normalize: whether to divide by |y|.

    Returns:
        (B,) nats per token if `normalize`, else nats; may be negative. float32 at least, without
        gradient.

    Raises:
        ValueError: The shapes differ, or a length is below 1.
    """
    if not cond_logps.shape == null_logps.shape == lengths.shape or cond_logps.dim() != 1:
        raise ValueError(
            "cond_logps, null_logps and lengths must be three (B,) tensors, got "
            f"{tuple(cond_logps.shape)}, {tuple(null_logps.shape)}, {tuple(lengths.shape)}"
        )
    if bool((lengths < 1).any()):
        row = int((lengths < 1).nonzero()[0])
        raise ValueError(
            f"response {row} of the batch has length {lengths[row].item()}: an empty response has "
            "no mutual information with its query"
        )
    dtype = torch.promote_types(cond_logps.dtype, torch.float32)
    information = cond_logps.detach().to(dtype) - null_logps.detach()
    return information / lengths if normalize else information


def information_gain(cond_logps: Tensor, null_logps: Tensor) -> Tensor:
    """Computes KL( pi_ref(. | x, y_<t) || pi_ref(. | x0, y_<t) ) at each response position.

    The sum over the positions of a response is the `expected` estimator of I(x; y), the mean is
    the normalised estimator (method section 3).

    Args:
        cond_logps: (N, V) log-probabilities of the next token after the query, nats.
        null_logps: (N, V) log-probabilities at the same positions after the null prompt, nats.

    Returns:
        (N,) nats, float32, never negative beyond rounding.
    """
    # A token with probability 0 adds nothing: p log p -> 0.
    gain = (cond_logps - null_logps).masked_fill(cond_logps == -torch.inf, 0)
    return (cond_logps.exp() * gain).sum(dim=-1)
