"""Identifies the reference of a run over all its ranks, for the store of the scores. The scorer
calls it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from bdpo_plugin.reference.fingerprint import (
    UnreadableReference,
    model_fingerprint,
    tokenizer_fingerprint,
)
from bdpo_plugin.reference.frozen_model import Reference


class Identity(NamedTuple):
    """The hex digests under which the scores of a reference are stored, the same in every rank.

    Attributes:
        weights: digests of the weights that the ranks hold, and of the tokenizer.
        computation: digests of everything that computes with them.
    """

    weights: list[str]
    computation: list[str]


def identify(reference: Reference, tokenizer: Any, accelerator: Accelerator) -> Identity:
    """Computes the identity of a reference. Call it in every rank: each may hold only a shard of
    the model, so the identity covers those of all ranks.

    Raises:
        UnreadableReference: A part of the reference cannot be read, in some rank.
    """
    fingerprint, why = None, ""
    try:
        with reference.activated():  # under the autocast of the reference pass
            kind = accelerator.device.type
            on = torch.is_autocast_enabled(kind)
            autocast = torch.get_autocast_dtype(kind) if on else "none"
            fingerprint = model_fingerprint(
                accelerator.unwrap_model(reference.model),
                adapter=reference.adapter,
                compute=f"{accelerator.mixed_precision}, autocast {autocast}",
            )
    except UnreadableReference as error:
        why = str(error)
    parts = gather_object([(fingerprint, why)])
    for of_rank, why in parts:
        if of_rank is None:
            raise UnreadableReference(why)
    weights, computed = (sorted(set(of)) for of in zip(*(f for f, _ in parts), strict=True))
    return Identity([*weights, tokenizer_fingerprint(tokenizer)], computed)
