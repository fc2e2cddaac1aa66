"""The sequences of a batch one after another in as many rows as cost least, not padded one by one.

The models of transformers keep the sequences of a row apart by position ids that begin again,
with every attention implementation: what varlen kernels do at no cost, and others by a mask as
large as the row's length squared.

Shapes: B sequences of a padded batch, T positions, R packed rows of W tokens, N positions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bdpo_plugin.reference.output_layer import text_config, unwrapped

#: The sequences of each packed row.
Rows = list[list[int]]


def packable(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether packed rows may be tried on the model: whether it keeps them apart is to be seen."""
    outer = unwrapped(model)
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    return (
        tensors == {"input_ids", "attention_mask"}
        and "position_ids" in signature(inner.forward).parameters
        and not getattr(getattr(outer, "active_peft_config", None), "is_prompt_learning", False)
        and not _compiled(model, outer)
    )


def _compiled(*models: nn.Module) -> bool:
    """A traced model does not look where the position ids begin again."""
    return any(
        hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
        for model in models
    )


def cheapest_rows(model: nn.Module, inputs: dict[str, Any]) -> Rows | None:
    """How to pack the padded (B, T) batch; None where it is impossible or does not pay.

    A layer of hidden size H costs about 24 H^2 operations a token, and 4 H more for each token
    that it is compared with in attention: R rows of W tokens cost R W (6 H + W).
    """
    if not packable(model, inputs):
        return None
    mask = inputs["attention_mask"]
    lengths = mask.sum(dim=1).tolist()
    if sum(lengths) == mask.numel():
        return None
    if _varlen(model):
        return [list(range(len(lengths)))]
    linear = 6 * text_config(model).hidden_size
    best, least = None, mask.numel() * (linear + mask.shape[1])
    for number in [1] if _counts_padding(model) else range(1, len(lengths)):
        rows = _balanced(lengths, number)
        width = max(sum(lengths[i] for i in row) for row in rows)
        if (cost := number * width * (linear + width)) < least:
            best, least = rows, cost
    return best


def trial_rows(model: nn.Module) -> Rows:
    """Three sequences of one length in rows such as :func:`cheapest_rows` makes of others."""
    return [[0, 1, 2]] if _varlen(model) or _counts_padding(model) else [[0, 1], [2]]


def _varlen(model: nn.Module) -> bool:
    attention = str(getattr(text_config(model), "_attn_implementation", ""))
    return "flash" in attention or "flex" in attention


def _counts_padding(model: nn.Module) -> bool:
    """A loss over the experts' load would count the padding of rows that are not full."""
    return bool(getattr(text_config(model), "output_router_logits", False))


def _balanced(lengths: Sequence[int], number: int) -> Rows:
    """`number` rows of about equal length: the longest sequence left goes to the shortest row."""
    rows: Rows = [[] for _ in range(number)]
    filled = [(0, row) for row in range(number)]
    heapify(filled)
    for sequence in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, row = filled[0]
        rows[row].append(sequence)
        heapreplace(filled, (length + lengths[sequence], row))
    return [sorted(row) for row in rows]


def pack(
    positions: Tensor, inputs: dict[str, Any], rows: Rows
) -> tuple[Tensor, dict[str, Any], Tensor | None]:
    """A (B, T) batch in `rows`.

    Returns:
        the positions, (R, W) bool; the inputs of the model's forward; the (N,) places, among the
        positions read in the packed rows, of those of the padded batch, None where they agree.
    """
    mask = inputs["attention_mask"].bool()
    of_sequences = mask.flatten().nonzero().flatten().split(mask.sum(dim=1).tolist())
    # where each packed token was; -1: padding, which is a sequence of its own
    source = pad_sequence(
        [torch.cat([of_sequences[i] for i in row]) for row in rows],
        batch_first=True,
        padding_value=-1,
    )
    real = source >= 0

    def packed(tensor: Tensor) -> Tensor:
        return tensor.flatten()[source].masked_fill(~real, 0)

    read = packed(positions)
    rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
    return (
        read,
        rest
        | {
            "input_ids": packed(inputs["input_ids"]),
            "position_ids": packed(mask.cumsum(dim=1) - 1),
            "use_cache": False,  # a model with a cache to fill takes a row for one sequence
        },
        source[read].argsort() if len(rows) > 1 else None,
    )
