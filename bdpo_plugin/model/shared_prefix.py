"""The sequences of a batch in one row, without padding, those that begin alike with their beginning
once: the cost is that of the tokens.

Attention keeps them apart (:mod:`~bdpo_plugin.model.tree_attention`); where it cannot, a batch
keeps the padding that its host gave it.

Shapes: B sequences of a padded batch, T positions, W tokens of the row, N positions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdpo_plugin.model.device import to_device
from bdpo_plugin.model.traits import RowRules
from bdpo_plugin.model.tree_attention import ARGUMENT, PrefixGroup, Tree


def plan_row(rules: RowRules, ids: Tensor, mask: Tensor) -> list[PrefixGroup] | None:
    """The groups of the padded (B, T) batch in a row; None where it is impossible or saves nothing.

    Args:
        rules: of the batch.
        ids, mask: its token ids and attention mask, bool, on the CPU.
    """
    lengths = mask.sum(dim=1).tolist()
    if max(lengths) > rules.longest:
        return None
    groups = (
        [PrefixGroup((i,)) for i in range(len(lengths))]
        if rules.each_once
        else prefix_groups(ids, mask)
    )
    size = sum(lengths) - sum(group.shared * (len(group.members) - 1) for group in groups)
    return groups if size <= rules.widest and size < mask.numel() else None


def prefix_groups(ids: Tensor, mask: Tensor) -> list[PrefixGroup]:
    """Each sequence of the (B, T) batch in one group, so that the fewest tokens are left."""
    tokens = [row.tolist() for row in ids[mask].split(mask.sum(dim=1).tolist())]
    order = sorted(range(len(tokens)), key=lambda i: tokens[i])
    alike = np.array([_common(tokens[i], tokens[j]) for i, j in pairwise(order)], dtype=int)
    # the most that the first n sequences of the dictionary's order save, and where their last group
    # begins: its sequences save what all of them have in common, once for each but one of them
    most, begins = np.zeros(len(order) + 1, dtype=int), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        common = np.minimum.accumulate(alike[: end - 1][::-1])
        saved = most[:end][::-1] + np.concatenate([[0], common * np.arange(1, end)])
        members = int(saved.argmax()) + 1
        most[end], begins[end] = saved[members - 1], end - members
    groups, end = [], len(order)
    while end:
        begin = begins[end]
        shared = int(alike[begin : end - 1].min()) if end - begin > 1 else 0
        groups.append(PrefixGroup(tuple(sorted(order[begin:end])), shared))
        end = begin
    return groups


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    different = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def pack(
    positions: Tensor,
    inputs: dict[str, Any],
    mask: Tensor,
    groups: Sequence[PrefixGroup],
    rules: RowRules,
    device: torch.device | None = None,
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """A (B, T) batch in a row.

    Args:
        positions, mask: the positions read and the attention mask, (B, T) bool, on the CPU.
        inputs: of the model's forward.
        groups: of the row.
        rules: of the batch.
        device: of the model; default that of its inputs.

    Returns:
        the positions, (1, W) bool, on the CPU; the inputs of the model's forward; the (N,)
        places, among the positions read in the row, of those of the padded batch.
    """
    lengths = mask.sum(dim=1).tolist()
    of_sequences = mask.flatten().nonzero().flatten().split(lengths)
    # of each token of the row: where it was
    source = torch.cat(
        [
            part
            for members, shared in groups
            for part in (
                of_sequences[members[0]][:shared],
                *(of_sequences[member][shared:] for member in members),
            )
        ]
    )
    # where each token of the batch has come to
    places = torch.zeros(mask.numel(), dtype=torch.long)
    places[source] = torch.arange(len(source))
    for members, shared in groups:
        for member in members[1:]:
            places[of_sequences[member][:shared]] = places[of_sequences[members[0]][:shared]]
    wanted = places[positions.flatten()]
    read = torch.zeros(len(source), dtype=torch.bool)
    read[wanted] = True

    ids = inputs["input_ids"]
    device = device or ids.device
    row = inputs | {
        "input_ids": ids.flatten()[to_device(source, ids.device)][None],
        "position_ids": to_device((mask.cumsum(dim=1) - 1).flatten()[source][None], device),
        "use_cache": False,  # a model with a cache to fill takes a row for one sequence
        ARGUMENT: Tree.of(groups, lengths, device),
        # Models pass a mask of four dimensions on as it is and make none of their own; what reads
        # it, and not the tree, sees nothing at all. One of two hides nothing.
        "attention_mask": torch.ones(1, len(source), dtype=torch.long, device=device)
        if rules.each_once
        else torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
    }
    return read[None], row, read.cumsum(dim=0)[wanted] - 1


def in_order(states: Tensor, order: Tensor | None) -> Tensor:
    """(n, ...) what was read in a row -> (N, ...) as in the padded batch.

    Args:
        order: (N,) the places that :func:`pack` told of; None where nothing was packed.
    """
    return states if order is None else states.index_select(0, to_device(order, states.device))
