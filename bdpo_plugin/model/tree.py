"""Attention over the sequences of a batch in one row, those that begin alike with their beginning
once: a segment at a time, without a mask.

The attention functions of transformers take what the model's forward was given by name. Those that
can do it are wrapped: where the forward was given a :class:`Tree`, each segment goes by itself to
the function that is wrapped, and else nothing changes. So a layer that is computed again in the
backward pass, as under gradient checkpointing, has its tree as well.

Shapes: W tokens of the row, K keys, h heads, d their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bdpo_plugin.model.device import moved

_VARLEN: Any
try:
    from torch.nn.attention import varlen as _VARLEN
except ImportError:  # of older releases of torch
    _VARLEN = None

#: The names of the attention functions of transformers that take a tree.
TREE_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3")

#: The argument of a model's forward that is a :class:`Tree`.
ARGUMENT = "bdpo_tree"


class Unit(NamedTuple):
    """Sequences of a batch that stay together, and their common tokens at the start."""

    members: tuple[int, ...]
    shared: int = 0


class Varlen(NamedTuple):
    """The segments as a kernel for sequences of any length takes them.

    Attributes:
        keys: (K,) the places in the row of the keys of all segments, one after another.
        lengths: where each segment begins among the queries and among the keys, (segments + 1,)
            int32 each, and the longest of each; named as transformers names them.
    """

    keys: Tensor
    lengths: dict[str, Any]


@dataclass(frozen=True)
class Tree:
    """The segments of a row. The first of a unit is a whole sequence, the others what its other
    sequences have beside the common beginning.

    Attributes:
        sizes: tokens of each.
        before: of each the tokens that come before it, which are those that its unit's first one
            begins with; 0 in a first one.
        varlen: the same for a kernel; None on a CPU.
    """

    sizes: list[int]
    before: list[int]
    varlen: Varlen | None

    @classmethod
    def of(cls, units: Sequence[Unit], lengths: Sequence[int], device: torch.device) -> Tree:
        """Of the units of a row.

        Args:
            lengths: of all sequences of the batch.
            device: of the model.
        """
        for name in TREE_ATTENTION:
            _teach(name)
        sizes, before = [], []
        for members, shared in units:
            for place, member in enumerate(members):
                before.append(shared if place else 0)
                sizes.append(lengths[member] - before[-1])
        return cls(sizes, before, None if device.type == "cpu" else _varlen(sizes, before, device))


def _varlen(sizes: list[int], before: list[int], device: torch.device) -> Varlen:
    keys, first, start = [], 0, 0
    for size, shared in zip(sizes, before, strict=True):
        first = first if shared else start
        keys += [torch.arange(first, first + shared), torch.arange(start, start + size)]
        start += size
    lengths: dict[str, Any] = {}
    for kind, of_kind in (("q", sizes), ("k", [a + b for a, b in zip(sizes, before, strict=True)])):
        ends = torch.tensor([0, *accumulate(of_kind)], dtype=torch.int32)
        lengths |= {f"cu_seq_lens_{kind}": moved(ends, device), f"max_length_{kind}": max(of_kind)}
    return Varlen(moved(torch.cat(keys), device), lengths)


def _teach(name: str) -> None:
    """Wrap the attention function of that name, if it is not wrapped yet."""
    attend: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[name]
    if hasattr(attend, "takes_tree"):
        return

    @wraps(attend)
    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        tree = kwargs.pop(ARGUMENT, None)
        if tree is None:
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        if args or (attention_mask is not None and attention_mask.numel() > 1):
            raise ValueError(f"{type(module).__name__} makes an attention mask of its own")
        kwargs.pop("position_ids", None)
        # written for GPUs, and not run by us
        if tree.varlen and name != "sdpa":
            key, value = (states[:, :, tree.varlen.keys] for states in (key, value))
            return attend(module, query, key, value, None, **kwargs, **tree.varlen.lengths)
        if tree.varlen and _VARLEN and query.dtype.itemsize == 2 and not kwargs.get("dropout"):
            return _torch_varlen(tree.varlen, query, key, value, kwargs.get("scaling")), None
        return _by_segments(attend, tree, module, query, key, value, **kwargs), None

    forward.takes_tree = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS[name] = forward


def _by_segments(
    attend: Callable[..., tuple[Tensor, Any]],
    tree: Tree,
    module: torch.nn.Module,
    *states: Tensor,
    **kwargs: Any,
) -> Tensor:
    """(1, h, W, d) queries, keys and values -> (1, W, h, d).

    A segment is run as the whole sequence that it ends, and its own part of the result is taken:
    so all are causal from their first token on, which kernels do without a mask.
    """
    outputs: list[Tensor] = []
    first: tuple[Tensor, ...] = ()
    segments = zip(*(tensor.split(tree.sizes, dim=2) for tensor in states), strict=True)
    for before, segment in zip(tree.before, segments, strict=True):
        if before:
            parts = zip(first, segment, strict=True)
            segment = tuple(torch.cat([f[:, :, :before], s], dim=2) for f, s in parts)
        else:
            first = segment
        outputs.append(attend(module, *segment, None, **kwargs)[0][:, before:])
    return torch.cat(outputs, dim=1)


def _torch_varlen(
    varlen: Varlen, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    """As :func:`_by_segments`, by the kernel of PyTorch for half precision. Written for GPUs, and
    not run by us."""
    groups = query.shape[1] != key.shape[1]
    key, value = (states[:, :, varlen.keys] for states in (key, value))
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    lengths = varlen.lengths
    output: Tensor = _VARLEN.varlen_attn(
        query,
        key,
        value,
        lengths["cu_seq_lens_q"],
        lengths["cu_seq_lens_k"],
        lengths["max_length_q"],
        lengths["max_length_k"],
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=groups,
    )
    return output[None]
