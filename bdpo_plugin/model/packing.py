"""The sequences of a batch one after another, not padded one by one.

Where attention takes a tree (:mod:`~bdpo_plugin.model.tree`) all lie in one row, and those that
begin alike, as those of a preference pair, have their beginning once: the cost is that of the
tokens. Elsewhere the models of transformers keep the sequences of a row apart by position ids that
begin again, with every attention implementation: what varlen kernels do at no cost, and others by a
mask as large as the row's length squared, so that there are as many rows as cost least.

Shapes: B sequences of a padded batch, T positions, R packed rows of W tokens, N positions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bdpo_plugin.model.device import moved
from bdpo_plugin.model.traits import RowRules
from bdpo_plugin.model.tree import ARGUMENT, Tree, Unit


class Plan(NamedTuple):
    """The units of each packed row, and how they are kept apart.

    Attributes:
        tree: whether attention is given them as a tree; else by position ids.
        counted: whether a loss counts the tokens of the row's mask.
    """

    rows: list[list[Unit]]
    tree: bool
    counted: bool = False


@dataclass(frozen=True)
class Apart:
    """Whether sequences are kept apart in a row by their position ids (not tried where a tree
    always does), and in one by a tree; and why so, in words."""

    packed: bool = False
    shared: bool = False
    why: str = field(default="", compare=False)

    def __bool__(self) -> bool:
        return self.packed or self.shared

    def and_also(self, other: Apart) -> Apart:
        """What both allow."""
        why = "; ".join(filter(None, (self.why, other.why)))
        return Apart(self.packed and other.packed, self.shared and other.shared, why)

    @property
    def kind(self) -> str:
        """What a batch is that is laid so."""
        return "shared prefix" if self.shared else "packed" if self.packed else "padded"


def plan_rows(rules: RowRules, ids: Tensor, mask: Tensor, apart: Apart) -> Plan | None:
    """How to pack the padded (B, T) batch; None where it is impossible or does not pay.

    Args:
        rules: of the batch.
        ids, mask: its token ids and attention mask, bool, on the CPU.
        apart: what was seen of the model.
    """
    lengths = mask.sum(dim=1).tolist()
    singles = [Unit((i,)) for i in range(len(lengths))]
    if apart.shared and rules.tree and max(lengths) <= rules.window:
        units = singles if rules.each_once else units_of(ids, mask)
        size = sum(lengths) - sum(unit.shared * (len(unit.members) - 1) for unit in units)
        if size <= rules.widest:
            return Plan([units], True, rules.each_once) if size < mask.numel() else None
    if not apart.packed or sum(lengths) == mask.numel():
        return None
    if rules.varlen:
        return Plan([singles], False)
    rows = _cheapest_rows(rules, lengths, mask.shape[1])
    return Plan([[singles[i] for i in row] for row in rows], False) if rows else None


def _cheapest_rows(rules: RowRules, lengths: list[int], padded: int) -> list[list[int]] | None:
    """The sequences of each row; None where it is cheaper to pad each to the length `padded`.

    A layer of hidden size H costs about 24 H^2 operations a token, and 4 H more for each token
    that it is compared with in attention: R rows of W tokens cost R W (6 H + W).
    """
    linear = 6 * rules.hidden_size
    best, least = None, len(lengths) * padded * (linear + padded)
    for number in [1] if rules.each_once else range(1, len(lengths) + 1):
        rows = _balanced(lengths, number)
        width = max(sum(lengths[i] for i in row) for row in rows)
        if width <= rules.widest and (cost := number * width * (linear + width)) < least:
            best, least = rows, cost
        if width == max(lengths):  # more rows would not be narrower
            break
    return best


def units_of(ids: Tensor, mask: Tensor) -> list[Unit]:
    """Each sequence of the (B, T) batch in one unit, so that the fewest tokens are left."""
    tokens = [row.tolist() for row in ids[mask].split(mask.sum(dim=1).tolist())]
    order = sorted(range(len(tokens)), key=lambda i: tokens[i])
    alike = np.array([_common(tokens[i], tokens[j]) for i, j in pairwise(order)], dtype=int)
    # the most that the first n sequences of the dictionary's order save, and where their last unit
    # begins: its sequences save what all of them have in common, once for each but one of them
    most, begins = np.zeros(len(order) + 1, dtype=int), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        common = np.minimum.accumulate(alike[: end - 1][::-1])
        saved = most[:end][::-1] + np.concatenate([[0], common * np.arange(1, end)])
        members = int(saved.argmax()) + 1
        most[end], begins[end] = saved[members - 1], end - members
    units, end = [], len(order)
    while end:
        begin = begins[end]
        shared = int(alike[begin : end - 1].min()) if end - begin > 1 else 0
        units.append(Unit(tuple(sorted(order[begin:end])), shared))
        end = begin
    return units


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    different = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def _balanced(sizes: Sequence[int], number: int) -> list[list[int]]:
    """`number` rows of about equal length: the largest that is left goes to the shortest row."""
    rows: list[list[int]] = [[] for _ in range(number)]
    filled = [(0, row) for row in range(number)]
    heapify(filled)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size, row = filled[0]
        rows[row].append(index)
        heapreplace(filled, (size + sizes[index], row))
    return [sorted(row) for row in rows]


def trial_plans(rules: RowRules, length: int, common: int) -> tuple[Plan, Plan | None]:
    """Three sequences of that length in rows such as :func:`plan_rows` makes without a tree; and in
    one with a tree, in which the first two share their `common` tokens, if that may be tried."""
    one, other, last = Unit((0,)), Unit((1,)), Unit((2,))
    in_one = [[one, other, last]]
    tree = in_one if rules.each_once else [[Unit((0, 1), common), last]]
    rows = in_one if rules.varlen or rules.each_once else [[one, other], [last]]
    may = rules.tree and length <= rules.window
    return Plan(rows, False), Plan(tree, True, rules.each_once) if may else None


def pack(
    positions: Tensor,
    inputs: dict[str, Any],
    mask: Tensor,
    plan: Plan,
    device: torch.device | None = None,
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """A (B, T) batch as in `plan`.

    Args:
        positions, mask: the positions read and the attention mask, (B, T) bool, on the CPU.
        inputs: of the model's forward.
        device: of the model; default that of its inputs.

    Returns:
        the positions, (R, W) bool, on the CPU; the inputs of the model's forward; the (N,)
        places, among the positions read in the packed rows, of those of the padded batch.
    """
    lengths = mask.sum(dim=1).tolist()
    of_sequences = mask.flatten().nonzero().flatten().split(lengths)
    rows = [
        torch.cat(
            [
                part
                for members, shared in row
                for part in (
                    of_sequences[members[0]][:shared],
                    *(of_sequences[member][shared:] for member in members),
                )
            ]
        )
        for row in plan.rows
    ]
    # of each packed token: where it was; -1 is padding
    source = pad_sequence(rows, batch_first=True, padding_value=-1)
    real = source >= 0

    # where each token of the batch has come to
    places = torch.zeros_like(mask.flatten(), dtype=torch.long)
    places[source[real]] = real.flatten().nonzero().flatten()
    for members, shared in (unit for row in plan.rows for unit in row if unit.shared):
        for member in members[1:]:
            places[of_sequences[member][:shared]] = places[of_sequences[members[0]][:shared]]
    wanted = places[positions.flatten()]
    read = torch.zeros_like(real.flatten())
    read[wanted] = True

    ids = inputs["input_ids"]
    device = device or ids.device
    position_ids = (mask.cumsum(dim=1) - 1).flatten()[source].masked_fill(~real, 0)
    packed_inputs = {name: value for name, value in inputs.items() if name != "attention_mask"} | {
        "input_ids": ids.flatten()[source.to(ids.device)].masked_fill(~real.to(ids.device), 0),
        "position_ids": moved(position_ids, device),
        "use_cache": False,  # a model with a cache to fill takes a row for one sequence
    }
    if plan.tree:
        packed_inputs[ARGUMENT] = Tree.of(plan.rows[0], lengths, device)
        # Models pass a mask of four dimensions on as it is and make none of their own; what reads
        # it, and not the tree, sees nothing at all. One of two hides nothing.
        packed_inputs["attention_mask"] = (
            torch.ones(source.shape, dtype=torch.long, device=device)
            if plan.counted
            else torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        )
    return read.view_as(real), packed_inputs, read.cumsum(dim=0)[wanted] - 1


def in_order(states: Tensor, order: Tensor | None) -> Tensor:
    """(n, ...) what was read in packed rows -> (N, ...) as in the padded batch.

    Args:
        order: (N,) the places that :func:`pack` told of; None where nothing was packed.
    """
    return states if order is None else states.index_select(0, moved(order, states.device))
