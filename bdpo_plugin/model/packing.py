"""The sequences of a batch one after another in as many rows as cost least, not padded one by one.

The models of transformers keep the sequences of a row apart by position ids that begin again,
with every attention implementation: what varlen kernels do at no cost, and others by a mask as
large as the row's length squared. Where the mask can be our own, two sequences that begin alike,
as those of a preference pair, have their beginning once.

Shapes: B sequences of a padded batch, T positions, R packed rows of W tokens, N positions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bdpo_plugin.model.traits import RowRules


class Unit(NamedTuple):
    """One or two sequences of a batch that stay together, and their common tokens at the start."""

    members: tuple[int, ...]
    shared: int = 0


#: The units of each packed row.
Plan = list[list[Unit]]


def cheapest_plan(rules: RowRules, ids: Tensor, mask: Tensor, *, share: bool) -> Plan | None:
    """How to pack the padded (B, T) batch; None where it is impossible or does not pay.

    A layer of hidden size H costs about 24 H^2 operations a token, and 4 H more for each token
    that it is compared with in attention: R rows of W tokens cost R W (6 H + W).

    Args:
        rules: of the batch.
        ids, mask: its token ids and attention mask, bool, on the CPU.
        share: whether sequences that begin alike may have their beginning once.
    """
    lengths = mask.sum(dim=1).tolist()
    singles = [Unit((i,)) for i in range(len(lengths))]
    ways = [] if sum(lengths) == mask.numel() else [singles]
    if ways and rules.varlen:
        return [singles]
    if share and rules.own_mask:
        ways.append(_units(ids, mask))
    linear = 6 * rules.hidden_size
    best, least = None, mask.numel() * (linear + mask.shape[1])
    for units in ways:
        sizes = [sum(lengths[i] - u.shared for i in u.members) + u.shared for u in units]
        for number in [1] if rules.each_once else range(1, len(units) + 1):
            rows = _balanced(sizes, number)
            width = max(sum(sizes[i] for i in row) for row in rows)
            if width <= rules.widest and (cost := number * width * (linear + width)) < least:
                best, least = [[units[i] for i in row] for row in rows], cost
            if width == max(sizes):  # more rows would not be narrower
                break
    return best


def _units(ids: Tensor, mask: Tensor) -> list[Unit]:
    """Each sequence in one unit: two together where they begin alike."""
    of_rows = ids[mask].split(mask.sum(dim=1).tolist())
    tokens = [row.tolist() for row in of_rows]
    order = sorted(range(len(tokens)), key=lambda i: tokens[i])
    # of each with the next one in the dictionary's order
    alike = [_common(tokens[i], tokens[j]) for i, j in pairwise(order)] + [0, 0]
    units, place = [], 0
    while place < len(order):
        together = alike[place] > 0 and alike[place] >= alike[place + 1]
        members = order[place : place + 1 + together]
        units.append(Unit(tuple(sorted(members)), alike[place] if together else 0))
        place += len(members)
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


def trial_plans(rules: RowRules, common: int) -> tuple[Plan, Plan | None]:
    """Three sequences in rows such as :func:`cheapest_plan` makes; and so that the first two share
    their `common` tokens, if that may be tried."""
    one, other, last = Unit((0,)), Unit((1,)), Unit((2,))
    if rules.varlen or rules.each_once:
        return [[one, other, last]], None
    shared = [[Unit((0, 1), common), last]] if rules.own_mask else None
    return [[one, other], [last]], shared


def pack(
    positions: Tensor, inputs: dict[str, Any], mask: Tensor, plan: Plan
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """A (B, T) batch as in `plan`.

    Args:
        positions, mask: the positions read and the attention mask, (B, T) bool, on the CPU.
        inputs: of the model's forward, on its device.

    Returns:
        the positions, (R, W) bool, on the CPU; the inputs of the model's forward; the (N,)
        places, among the positions read in the packed rows, of those of the padded batch.
    """
    of_sequences = mask.flatten().nonzero().flatten().split(mask.sum(dim=1).tolist())
    # of each packed token: where it was; its unit; its branch: 0 what the members share, else the
    # member. -1 is padding.
    columns: list[list[Tensor]] = [[], [], []]
    for row in plan:
        pieces = [
            (tokens, unit, branch)
            for unit, (members, shared) in enumerate(row)
            for branch, tokens in enumerate(
                [of_sequences[members[0]][:shared], *(of_sequences[m][shared:] for m in members)]
            )
        ]
        columns[0].append(torch.cat([tokens for tokens, _, _ in pieces]))
        for column, kind in zip(columns[1:], (1, 2), strict=True):
            column.append(torch.cat([torch.full_like(p[0], p[kind]) for p in pieces]))
    source, units, branches = (
        pad_sequence(column, batch_first=True, padding_value=-1) for column in columns
    )
    real = source >= 0

    # where each token of the batch has come to
    places = torch.zeros_like(mask.flatten(), dtype=torch.long)
    places[source[real]] = real.flatten().nonzero().flatten()
    for members, shared in (unit for row in plan for unit in row if unit.shared):
        for member in members[1:]:
            places[of_sequences[member][:shared]] = places[of_sequences[members[0]][:shared]]
    wanted = places[positions.flatten()]
    read = torch.zeros_like(real.flatten())
    read[wanted] = True

    ids = inputs["input_ids"]
    device = ids.device
    position_ids = (mask.cumsum(dim=1) - 1).flatten()[source].masked_fill(~real, 0)
    packed_inputs = {name: value for name, value in inputs.items() if name != "attention_mask"} | {
        "input_ids": ids.flatten()[source.to(device)].masked_fill(~real.to(device), 0),
        "position_ids": position_ids.to(device),
        "use_cache": False,  # a model with a cache to fill takes a row for one sequence
    }
    if any(unit.shared for row in plan for unit in row):
        packed_inputs["attention_mask"] = _tree_mask(units.to(device), branches.to(device))
    return read.view_as(real), packed_inputs, read.cumsum(dim=0)[wanted] - 1


def in_order(states: Tensor, order: Tensor | None) -> Tensor:
    """(n, ...) what was read in packed rows -> (N, ...) as in the padded batch.

    Args:
        order: (N,) the places that :func:`pack` told of; None where nothing was packed.
    """
    return states if order is None else states.index_select(0, order.to(states.device))


def _tree_mask(units: Tensor, branches: Tensor) -> Tensor:
    """(R, 1, W, W) bool: a token sees those before it that its unit shares or its branch has."""
    rows, columns = units[:, :, None], units[:, None, :]
    of_row, of_column = branches[:, :, None], branches[:, None, :]
    seen = (rows == columns) & ((of_column == 0) | (of_column == of_row))
    return seen.tril()[:, None]
