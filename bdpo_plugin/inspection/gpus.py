"""Estimates by formula what a run needs of common GPUs, for `bdpo recipes list`. Nothing here was
measured on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bdpo_plugin.data.pairs import Pair, Side
from bdpo_plugin.inspection.cost import epoch_cost
from bdpo_plugin.inspection.memory import GIB, Memory, estimate
from bdpo_plugin.inspection.model_shape import Shape
from bdpo_plugin.inspection.plan import Plan


class Card(NamedTuple):
    """A GPU: its name, its memory in 10^9 bytes, and the operations per second that its maker
    names for products of matrices in bfloat16."""

    name: str
    gigabytes: int
    operations: float


CARDS = (Card("A10", 24, 125e12), Card("A40", 48, 149.7e12), Card("A100", 80, 312e12))
#: The share of a card's memory that an estimate may fill. CUDA and its allocator need the rest.
USABLE = 0.9
#: The assumed share of a card's operations per second that a run reaches.
UTILISATION = 0.3
#: The assumed training set: pairs, tokens of a prompt and of a response, and of the null prompt.
PAIRS, PROMPT, RESPONSE, NULL_PROMPT = 20_000, 128, 128, 10


class Needs(NamedTuple):
    """What a run needs.

    Attributes:
        memory: the estimated memory of each device.
        hours: for each of :data:`CARDS` the estimated hours of the first epoch over :data:`PAIRS`
            pairs, with scoring; None if the run does not fit.
    """

    memory: Memory
    hours: tuple[float | None, ...]


def fits(peak: float, size: float) -> bool:
    """Whether an estimated peak fits into a device with `size` of memory; both in GiB."""
    return peak < USABLE * size


def needs_of(shape: Shape, plan: Plan, processes: int = 1) -> Needs:
    """Estimates what a run needs of each card, where `processes` cards work together."""
    memory = estimate(shape, plan, processes)
    prompt, response = np.zeros(PROMPT, int), np.zeros(RESPONSE, int)
    pair = Pair(Side(prompt, response), Side(prompt, response))
    cost = epoch_cost(shape, plan, [pair], NULL_PROMPT, shared=True, mi=True)
    operations = PAIRS * (cost.ours + cost.scoring) / processes
    return Needs(
        memory,
        tuple(
            operations / (3600 * card.operations * UTILISATION)
            if fits(memory.peak, card.gigabytes * 1e9 / GIB)
            else None
            for card in CARDS
        ),
    )
