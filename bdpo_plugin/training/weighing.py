"""Computes the balance weights of pairs from their scores, by the method or by a callable of the
user. The scorer calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from bdpo_plugin.objective import BalanceWeights, balance_weights
from bdpo_plugin.objective.control import controlled
from bdpo_plugin.reference.score_pairs import PairScores
from bdpo_plugin.settings import BDPOError, BDPOSettings

#: A function from the mutual information (chosen, rejected), each (B,), to the pairs' weights. It
#: may ask for more by name, see :func:`asked_columns`.
Weigh = Callable[..., BalanceWeights]
#: Numbers of response tokens, each (B,): what `weigh` may ask for beside columns of the data.
LENGTHS = ("chosen_tokens", "rejected_tokens")


def asked_columns(weigh: Weigh | None) -> tuple[str, ...]:
    """Returns the columns of the data that a `weigh` callable asks for: its keyword-only parameters
    without a default, less :data:`LENGTHS`."""
    return tuple(name for name in _asked(weigh) if name not in LENGTHS)


def _asked(weigh: Weigh | None) -> tuple[str, ...]:
    parameters: Any = ()
    if weigh is not None:
        with suppress(ValueError):  # some functions written in C have no signature
            parameters = inspect.signature(weigh).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)


def weights_of(
    scores: PairScores,
    settings: BDPOSettings,
    *,
    weigh: Weigh | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> BalanceWeights:
    """Computes the weights of B pairs (method sections 5 and 6), all 1 if their mutual information
    was not measured.

    Args:
        weigh: replaces :func:`~bdpo_plugin.objective.balance_weights`.
        columns: the columns of the data that `weigh` asks for, each of B values.
        groups: the group of each pair, for a control that shuffles within groups.

    Raises:
        BDPOError: The `weigh` callable returns something else than weights.
    """
    if not scores.measured:
        return BalanceWeights(*[torch.ones_like(scores.ref_chosen_logps)] * 3)
    mi = (scores.mi_chosen, scores.mi_rejected)
    if settings.control_kind is not None:
        mi = controlled(settings.control_kind, *mi, seed=seed, groups=groups)
    if weigh is None:
        return balance_weights(
            *mi,
            alpha=settings.alpha,
            weighting=settings.weighting,
            balance=settings.balance,
            scaling=settings.scaling,
        )
    given = {
        name: getattr(scores, name) if name in LENGTHS else (columns or {})[name]
        for name in _asked(weigh)
    }
    weights = BalanceWeights(*(t.detach().float() for t in weigh(*mi, **given)))
    if any(t.shape != mi[0].shape or not t.isfinite().all() for t in weights):
        raise BDPOError(
            "The `weigh` callable must return three finite tensors of the shape of its "
            f"arguments, {tuple(mi[0].shape)}: chosen, rejected, scale."
        )
    return weights
