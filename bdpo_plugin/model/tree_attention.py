"""Computes attention over a batch packed in one row, in which a common prefix stands once. It
processes one segment at a time and needs no mask.

The attention functions of transformers receive the keyword arguments of the model's forward. The
functions that support it are wrapped here: if the forward was given a :class:`Tree`, the wrapper
calls the wrapped function for each segment; else it changes nothing. Because the tree is an
argument, a layer that is computed again in the backward pass (gradient checkpointing) has it too.

Shapes: W tokens of the row, K keys, h heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bdpo_plugin.model import varlen_kernel
from bdpo_plugin.model.varlen_kernel import Varlen

#: The names of the attention functions of transformers that take a tree, even where a host has
#: replaced the function. Others take it if they are transformers' flash function under another
#: name.
TREE_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3")

#: The argument of a model's forward that takes a :class:`Tree`; or, to test a model, a callable
#: that each layer calls with the name of its attention function, this function, the layer itself,
#: its (query, key, value) and a dictionary of the other arguments.
ARGUMENT = "bdpo_tree"


class PrefixGroup(NamedTuple):
    """Sequences of a batch that are packed together, and the number of tokens of their common
    prefix."""

    members: tuple[int, ...]
    shared: int = 0


@dataclass(frozen=True)
class Tree:
    """The segments of a row. The first segment of a group is a whole sequence; each other segment
    is a sequence of the group without the common prefix.

    Attributes:
        sizes: the number of tokens of each segment.
        before: the number of prefix tokens that each segment continues, which are the first tokens
            of its group's first segment; 0 for a first segment.
        varlen: the same for a variable-length kernel; None on a CPU.
    """

    sizes: list[int]
    before: list[int]
    varlen: Varlen | None

    @classmethod
    def of(
        cls, groups: Sequence[PrefixGroup], lengths: Sequence[int], device: torch.device
    ) -> Tree:
        """Builds the tree of a row.

        Args:
            groups: the prefix groups of the row.
            lengths: the lengths of all sequences of the batch, in tokens.
            device: the device of the model.
        """
        teach()
        sizes, before = [], []
        for members, shared in groups:
            for place, member in enumerate(members):
                before.append(shared if place else 0)
                sizes.append(lengths[member] - before[-1])
        varlen = None if device.type == "cpu" else Varlen.of(sizes, before, device)
        return cls(sizes, before, varlen)


def takes_tree(name: str) -> bool:
    """Whether the attention function of this name takes a tree."""
    if name in TREE_ATTENTION:
        return True
    found = ALL_ATTENTION_FUNCTIONS.get(name)
    return getattr(found, "__wrapped__", found) is flash_attention_forward


def teach() -> None:
    """Wraps all attention functions that take a tree, if they are not wrapped yet."""
    for name in filter(takes_tree, [*ALL_ATTENTION_FUNCTIONS]):
        _teach(name)


def _teach(name: str) -> None:
    """Wraps the attention function of this name, if it is not wrapped yet."""
    attend: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[name]
    if hasattr(attend, "takes_tree"):
        return

    @wraps(attend)
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        tree = kwargs.pop(ARGUMENT, None)
        if callable(tree):  # a test of the layer, beside the usual computation
            tree(name, attend, module, (query, key, value), kwargs)
        if not isinstance(tree, Tree):
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        if args or (attention_mask is not None and attention_mask.numel() > 1):
            raise ValueError(f"{type(module).__name__} makes its own attention mask")
        return attend_shared(name, attend, tree, module, query, key, value, **kwargs), None

    forward.takes_tree = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS[name] = forward


def attend_shared(
    name: str,
    attend: Callable[..., tuple[Tensor, Any]],
    tree: Tree,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Computes attention over a row: (1, h, W, d) queries, keys and values -> (1, W, h, d).

    Raises:
        ValueError: The layer adds a bias by position.
    """
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} has a bias by position")
    kwargs.pop("position_ids", None)
    # The branches with `varlen` run on GPUs only; the tests replace their kernels.
    varlen = tree.varlen and tree.varlen.to(query.device)
    if varlen and name != "sdpa":
        key, value = (states[:, :, varlen.keys] for states in (key, value))
        return attend(module, query, key, value, None, **kwargs, **varlen.lengths)[0]
    if varlen:
        states = varlen_kernel.autocast(query, key, value)
        if varlen_kernel.takes(*states, **kwargs):
            return varlen_kernel.attend(varlen, *states, **kwargs)
    return _by_segments(attend, tree, module, query, key, value, **kwargs)


def _by_segments(
    attend: Callable[..., tuple[Tensor, Any]],
    tree: Tree,
    module: nn.Module,
    *states: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Computes attention segment by segment: (1, h, W, d) queries, keys and values -> (1, W, h, d).

    A segment runs together with its prefix as one whole sequence, and only the segment's part of
    the result is kept. So attention is causal from the first token on, which kernels support
    without a mask. If the whole sequence is longer than the sliding window of the layer, a mask
    limits what its tokens see.
    """
    window = kwargs.get("sliding_window")
    outputs: list[Tensor] = []
    first: tuple[Tensor, ...] = ()
    segments = zip(*(tensor.split(tree.sizes, dim=2) for tensor in states), strict=True)
    for before, segment in zip(tree.before, segments, strict=True):
        if not before:
            first = segment
        length = before + segment[0].shape[2]
        if window and length > window and segment[0].shape[2]:
            seen = max(0, before - window + 1)
            whole = _joined(first, segment, seen, before)
            mask = window_mask(before - seen, length - seen, window, segment[0].device)
            outputs.append(attend(module, segment[0], *whole[1:], mask, **kwargs)[0])
        else:
            whole = _joined(first, segment, 0, before)
            outputs.append(attend(module, *whole, None, **kwargs)[0][:, before:])
    return torch.cat(outputs, dim=1)


def _joined(
    first: Sequence[Tensor], segment: Sequence[Tensor], begin: int, end: int
) -> Sequence[Tensor]:
    """Prepends the states `begin` to `end` of the group's first segment to those of a segment."""
    if begin == end:
        return segment
    parts = zip(first, segment, strict=True)
    return [torch.cat([f[:, :, begin:end], s], dim=2) for f, s in parts]


def window_mask(begin: int, end: int, window: int, device: torch.device) -> Tensor:
    """Mask of the tokens `begin` to `end` over all tokens up to `end`, causal and limited to the
    window: (1, 1, end - begin, end) bool."""
    back = torch.arange(begin, end, device=device)[:, None] - torch.arange(end, device=device)
    return ((back >= 0) & (back < window))[None, None]
