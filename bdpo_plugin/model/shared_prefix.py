"""Packs a padded batch into one row without padding, in which a common prefix of several sequences
stands once. The response reader calls it.

Attention keeps the sequences independent (:mod:`~bdpo_plugin.model.tree_attention`). If a model
cannot do that, its batches keep the padding of their host.

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
    """Plans the row of a padded (B, T) batch.

    Args:
        rules: the limits on rows for the batch.
        ids: (B, T) its token ids, on the CPU.
        mask: (B, T) bool, its attention mask, on the CPU.

    Returns:
        The prefix groups of the row; None if the batch does not fit or a row saves nothing.
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
    """Assigns each sequence of the (B, T) batch to one group.

    Of all groups of neighbours in lexicographic order, these leave the fewest tokens in the row.
    """
    tokens = [row.tolist() for row in ids[mask].split(mask.sum(dim=1).tolist())]
    order = sorted(range(len(tokens)), key=lambda i: tokens[i])
    alike = np.array([_common(tokens[i], tokens[j]) for i, j in pairwise(order)], dtype=int)
    # Dynamic programming over the sequences in lexicographic order. `most[n]` is the most tokens
    # that the first n of them can save, and `begins[n]` is where their last group begins. A group
    # saves its common prefix once for each of its sequences but one.
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
    """Packs a (B, T) batch into one row.

    Args:
        positions: (B, T) bool, the positions to read, on the CPU.
        inputs: the arguments of the model's forward.
        mask: (B, T) bool, the attention mask, on the CPU.
        groups: the prefix groups of the row.
        rules: the limits on rows for the batch.
        device: the device of the model; default: that of `inputs`.

    Returns:
        The positions to read, (1, W) bool, on the CPU; the arguments of the model's forward; and,
        for each of the N positions of the padded batch, its index among the positions read in the
        row, (N,).
    """
    lengths = mask.sum(dim=1).tolist()
    of_sequences = mask.flatten().nonzero().flatten().split(lengths)
    # for each token of the row, its index in the flattened batch
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
    # for each token of the flattened batch, its index in the row
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
        "use_cache": False,  # with a cache, a model would take the row for one sequence
        ARGUMENT: Tree.of(groups, lengths, device),
        # Models pass a mask with four dimensions on as it is and build none of their own. It masks
        # everything, so that a layer that reads it instead of the tree sees no token at all. The
        # mask with two dimensions masks nothing.
        "attention_mask": torch.ones(1, len(source), dtype=torch.long, device=device)
        if rules.each_once
        else torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
    }
    return read[None], row, read.cumsum(dim=0)[wanted] - 1


def in_order(states: Tensor, order: Tensor | None) -> Tensor:
    """Brings states read in a row into the order of the padded batch.

    Args:
        states: (n, ...) states at the positions read in the row.
        order: (N,) the indices returned by :func:`pack`; None if the batch was not packed.

    Returns:
        (N, ...) states.
    """
    return states if order is None else states.index_select(0, to_device(order, states.device))
