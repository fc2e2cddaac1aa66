"""Controls (`bdpo_control`): B-DPO in which each pair is weighted by other mutual information than
its own. The scorer of a run calls :func:`controlled`.

An advantage of B-DPO over its control shows an effect of the mutual information. An advantage of
both over DPO shows an effect of unequal weights as such.
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
    """Returns the mutual information by which a control weights the B pairs of a dataset.

    ``shuffled``: each pair gets that of another pair, the same one in every rank.
    ``swapped``: the values of the chosen and the rejected response are exchanged.
    ``random``: as ``shuffled``; then a fair coin decides for each pair whether its values are
    exchanged, so that the weights have the same spread and favour neither response.

    Args:
        control: ``shuffled``, ``swapped`` or ``random``.
        mi_chosen, mi_rejected: (B,) the measured mutual information, nats or nats per token.
        seed: the seed of the shuffle and of the coins.
        groups: the group of each pair; if given, pairs are shuffled within their group.

    Returns:
        Two (B,) tensors, for the chosen and the rejected responses, in the unit of the arguments.

    Raises:
        BDPOError: There is one pair only, which cannot be shuffled.
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
    """Returns for each pair the index of the pair whose values it gets, never its own, (B,).

    The order is a random cycle within each group. All pairs that are alone in their group form one
    more group; if there is only one such pair, it joins the largest group.
    """
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
