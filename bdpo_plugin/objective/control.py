"""Controls: B-DPO with mutual information that is not the pair's own (`bdpo_control`).

What B-DPO has over its control is due to whose mutual information weighs a pair. What both have
over DPO is due to unequal weights as such.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from bdpo_plugin.settings import BDPOError


def controlled(
    control: str,
    mi_chosen: Tensor,
    mi_rejected: Tensor,
    *,
    seed: int,
    groups: Sequence[Hashable] | None = None,
) -> tuple[Tensor, Tensor]:
    """The mutual information that a control weighs the B pairs of a dataset by, each (B,).

    ``shuffled``: that of another pair, the same in every rank; ``swapped``: of chosen and rejected
    the other's; ``random``: as shuffled, and then swapped in each pair that a fair coin chooses, so
    that the weights have the same spread and favour neither side.

    Args:
        control: one of these.
        mi_chosen, mi_rejected: (B,), as measured.
        seed: of the shuffle and the coins.
        groups: of each pair, for a shuffle within those of the same group.

    Raises:
        BDPOError: there is one pair only, which cannot be shuffled.
    """
    if control == "swapped":
        return mi_rejected, mi_chosen
    generator = torch.Generator().manual_seed(seed)
    order = _derangement(groups or [None] * len(mi_chosen), generator)
    mi_chosen, mi_rejected = mi_chosen[order], mi_rejected[order]
    if control == "shuffled":
        return mi_chosen, mi_rejected
    heads = torch.rand(len(order), generator=generator) < 0.5
    return (
        torch.where(heads, mi_rejected, mi_chosen),
        torch.where(heads, mi_chosen, mi_rejected),
    )


def _derangement(groups: Sequence[Hashable], generator: torch.Generator) -> Tensor:
    """(B,) for each pair the place of the one whose values it gets, never its own: a random cycle
    of each group. Pairs that are alone in theirs make up one; a last one joins the largest."""
    if len(groups) < 2:
        raise BDPOError(
            "`bdpo_control` cannot shuffle a dataset of one pair: give it two at least, or leave "
            "the key out."
        )
    members: dict[Hashable, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    cycles = [places for places in members.values() if len(places) > 1]
    alone = [places[0] for places in members.values() if len(places) == 1]
    if len(alone) == 1:
        max(cycles, key=len).extend(alone)
    elif alone:
        cycles.append(alone)
    order = torch.empty(len(groups), dtype=torch.long)
    for places in map(torch.tensor, cycles):
        cycle = places[torch.randperm(len(places), generator=generator)]
        order[cycle] = cycle.roll(1)
    return order
