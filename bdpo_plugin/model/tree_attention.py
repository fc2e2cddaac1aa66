"""Attention over the sequences of a batch in one row, those that begin alike with their beginning
once: a segment at a time, without a mask.

The attention functions of transformers take what the model's forward was given by name. Those that
can do it are wrapped: where the forward was given a :class:`Tree`, each segment goes by itself to
the function that is wrapped, and else nothing changes. So a layer that is computed again in the
backward pass, as under gradient checkpointing, has its tree as well.

Shapes: W tokens of the row, K keys, h heads, d their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bdpo_plugin.model.device import to_device

_VARLEN: Any
try:
    from torch.nn.attention import varlen as _VARLEN
except ImportError:  # of older releases of torch
    _VARLEN = None

#: The names of the attention functions of transformers that take a tree, whatever a host has put
#: in their place. Others take it if they are transformers' flash function by another name.
TREE_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3")

#: What torch's kernel for sequences of any length can compute in.
KERNEL_DTYPES = (torch.float16, torch.bfloat16)

#: The argument of a model's forward that is a :class:`Tree`; or a function that each layer calls
#: with the name and the function of its attention, itself, its (query, key, value) and the rest.
ARGUMENT = "bdpo_tree"


class PrefixGroup(NamedTuple):
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

    def to(self, device: torch.device) -> Varlen:
        """On the device of a layer; a model may be spread over several."""
        if self.keys.device == device:
            return self
        there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.lengths.items()}
        return Varlen(self.keys.to(device), there)


@dataclass(frozen=True)
class Tree:
    """The segments of a row. The first of a group is a whole sequence, the others what its other
    sequences have beside the common beginning.

    Attributes:
        sizes: tokens of each.
        before: of each the tokens that come before it, which are those that its group's first one
            begins with; 0 in a first one.
        varlen: the same for a kernel; None on a CPU.
    """

    sizes: list[int]
    before: list[int]
    varlen: Varlen | None

    @classmethod
    def of(
        cls, groups: Sequence[PrefixGroup], lengths: Sequence[int], device: torch.device
    ) -> Tree:
        """Of the groups of a row.

        Args:
            lengths: of all sequences of the batch.
            device: of the model.
        """
        teach()
        sizes, before = [], []
        for members, shared in groups:
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
        lengths |= {
            f"cu_seq_lens_{kind}": to_device(ends, device),
            f"max_length_{kind}": max(of_kind),
        }
    return Varlen(to_device(torch.cat(keys), device), lengths)


def takes_tree(name: str) -> bool:
    """Whether the attention function of that name takes a tree."""
    if name in TREE_ATTENTION:
        return True
    found = ALL_ATTENTION_FUNCTIONS.get(name)
    return getattr(found, "__wrapped__", found) is flash_attention_forward


def teach() -> None:
    """Wrap all attention functions that take a tree, if they are not wrapped yet."""
    for name in filter(takes_tree, [*ALL_ATTENTION_FUNCTIONS]):
        _teach(name)


def _teach(name: str) -> None:
    """Wrap the attention function of that name, if it is not wrapped yet."""
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
        if callable(tree):  # a trial, which looks on
            tree(name, attend, module, (query, key, value), kwargs)
        if not isinstance(tree, Tree):
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        if args or (attention_mask is not None and attention_mask.numel() > 1):
            raise ValueError(f"{type(module).__name__} makes an attention mask of its own")
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
    """(1, h, W, d) queries, keys and values of a row -> (1, W, h, d)."""
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} has a bias by position")
    kwargs.pop("position_ids", None)
    # what follows runs on GPUs; the tests have stand-ins for its kernels
    varlen = tree.varlen and tree.varlen.to(query.device)
    if varlen and name != "sdpa":
        key, value = (states[:, :, varlen.keys] for states in (key, value))
        return attend(module, query, key, value, None, **kwargs, **varlen.lengths)[0]
    if varlen:
        states = _autocast(query, key, value)
        if _kernel_takes(*states, **kwargs):
            return _torch_varlen(varlen, *states, **kwargs)
    return _by_segments(attend, tree, module, query, key, value, **kwargs)


def _by_segments(
    attend: Callable[..., tuple[Tensor, Any]],
    tree: Tree,
    module: nn.Module,
    *states: Tensor,
    **kwargs: Any,
) -> Tensor:
    """(1, h, W, d) queries, keys and values -> (1, W, h, d).

    A segment is run as the whole sequence that it ends, and its own part of the result is taken:
    so all are causal from their first token on, which kernels do without a mask. Where that is
    longer than the window of the layer, a mask says what its tokens see.
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
    """A segment's states, with those of its group's first one from `begin` to `end` before them."""
    if begin == end:
        return segment
    parts = zip(first, segment, strict=True)
    return [torch.cat([f[:, :, begin:end], s], dim=2) for f, s in parts]


def window_mask(begin: int, end: int, window: int, device: torch.device) -> Tensor:
    """(1, 1, end - begin, end) bool: what each token from `begin` on sees of all up to `end`."""
    back = torch.arange(begin, end, device=device)[:, None] - torch.arange(end, device=device)
    return ((back >= 0) & (back < window))[None, None]


def _autocast(*states: Tensor) -> Sequence[Tensor]:
    """As torch casts what its own attention is given."""
    kind = states[0].device.type
    if not torch.is_autocast_enabled(kind):
        return states
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in states]


def _varlen_parameters() -> Set[str]:
    """Of torch's kernel for sequences of any length: releases differ; none before 2.10."""
    return signature(_VARLEN.varlen_attn).parameters.keys() if _VARLEN else set()


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> bool:
    """Whether torch's kernel for sequences of any length can run what a layer wants."""
    takes, size = _varlen_parameters(), query.shape[-1]
    scaling = kwargs.get("scaling")
    return (
        ("window_size" in takes or ("is_causal" in takes and not kwargs.get("sliding_window")))
        and ("scale" in takes or scaling is None or math.isclose(scaling, size**-0.5))
        and query.dtype == key.dtype == value.dtype
        and query.dtype in KERNEL_DTYPES
        and size == value.shape[-1] <= 256
        and size % 8 == 0
        and not kwargs.get("dropout")
        and kwargs.get("is_causal") is not False
        and (not query.is_cuda or torch.cuda.get_device_capability(query.device) >= (8, 0))
    )


def _torch_varlen(
    varlen: Varlen, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> Tensor:
    """As :func:`_by_segments`, by the kernel of PyTorch for half precision."""
    takes, lengths = _varlen_parameters(), varlen.lengths
    key, value = (states[:, :, varlen.keys] for states in (key, value))
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if "window_size" in takes:
        options["window_size"] = ((kwargs.get("sliding_window") or 0) - 1, 0)
    else:
        options["is_causal"] = True
    if "scale" in takes:
        options["scale"] = kwargs.get("scaling")
    if "enable_gqa" in takes:
        options["enable_gqa"] = groups > 1
    else:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    ends = (lengths["cu_seq_lens_q"], lengths["cu_seq_lens_k"])
    longest = (lengths["max_length_q"], lengths["max_length_k"])
    output: Tensor = _VARLEN.varlen_attn(query, key, value, *ends, *longest, **options)
    return output[None]
