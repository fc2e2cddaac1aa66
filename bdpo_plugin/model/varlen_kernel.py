"""Attention over the segments of a row by one kernel for sequences of different lengths, on a GPU.
:mod:`~bdpo_plugin.model.tree_attention` calls it. The tests replace the kernel.

Shapes: W tokens of the row, K keys, h heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdpo_plugin.model.device import to_device

#: PyTorch's module with the kernel; None in a release that has none.
TORCH: Any
try:
    from torch.nn.attention import varlen as TORCH
except ImportError:  # an older release of torch
    TORCH = None

#: The dtypes that torch's kernel for variable-length sequences supports.
KERNEL_DTYPES = (torch.float16, torch.bfloat16)


class Varlen(NamedTuple):
    """The segments of a row in the form that a kernel for variable-length sequences takes.

    Attributes:
        keys: (K,) the indices in the row of the keys of all segments, one segment after another.
        lengths: the cumulative lengths of the segments among the queries and among the keys,
            (segments + 1,) int32 each, and the longest of each, under the names of transformers.
    """

    keys: Tensor
    lengths: dict[str, Any]

    @classmethod
    def of(cls, sizes: list[int], before: list[int], device: torch.device) -> Varlen:
        """Describes the segments of a row; the arguments are those of
        :class:`~bdpo_plugin.model.tree_attention.Tree`."""
        keys, first, start = [], 0, 0
        for size, shared in zip(sizes, before, strict=True):
            first = first if shared else start
            keys += [torch.arange(first, first + shared), torch.arange(start, start + size)]
            start += size
        lengths: dict[str, Any] = {}
        of_keys = [shared + size for shared, size in zip(before, sizes, strict=True)]
        for kind, of_kind in (("q", sizes), ("k", of_keys)):
            ends = torch.tensor([0, *accumulate(of_kind)], dtype=torch.int32)
            lengths |= {
                f"cu_seq_lens_{kind}": to_device(ends, device),
                f"max_length_{kind}": max(of_kind),
            }
        return cls(to_device(torch.cat(keys), device), lengths)

    def to(self, device: torch.device) -> Varlen:
        """Moves the tensors to the device of a layer; a model may be spread over several."""
        if self.keys.device == device:
            return self
        there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.lengths.items()}
        return Varlen(self.keys.to(device), there)


def autocast(*states: Tensor) -> Sequence[Tensor]:
    """Casts the states to the dtype of autocast, if it is on, as torch does for its own
    attention."""
    kind = states[0].device.type
    if not torch.is_autocast_enabled(kind):
        return states
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in states]


def parameters() -> Set[str]:
    """Names of the parameters of torch's kernel for variable-length sequences. They differ between
    releases of torch; before 2.10 there is no such kernel."""
    return signature(TORCH.varlen_attn).parameters.keys() if TORCH else set()


def takes(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> bool:
    """Whether torch's kernel for variable-length sequences supports the arguments of a layer."""
    known, size = parameters(), query.shape[-1]
    scaling = kwargs.get("scaling")
    return (
        ("window_size" in known or ("is_causal" in known and not kwargs.get("sliding_window")))
        and ("scale" in known or scaling is None or math.isclose(scaling, size**-0.5))
        and query.dtype == key.dtype == value.dtype
        and query.dtype in KERNEL_DTYPES
        and size == value.shape[-1] <= 256
        and size % 8 == 0
        and not kwargs.get("dropout")
        and kwargs.get("is_causal") is not False
        and (not query.is_cuda or torch.cuda.get_device_capability(query.device) >= (8, 0))
    )


def attend(varlen: Varlen, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """Computes attention over a row, (1, h, W, d) queries, keys and values -> (1, W, h, d), by
    PyTorch's kernel for half precision."""
    known, lengths = parameters(), varlen.lengths
    key, value = (states[:, :, varlen.keys] for states in (key, value))
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = ((kwargs.get("sliding_window") or 0) - 1, 0)
    else:
        options["is_causal"] = True
    if "scale" in known:
        options["scale"] = kwargs.get("scaling")
    if "enable_gqa" in known:
        options["enable_gqa"] = groups > 1
    else:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    ends = (lengths["cu_seq_lens_q"], lengths["cu_seq_lens_k"])
    longest = (lengths["max_length_q"], lengths["max_length_k"])
    output: Tensor = TORCH.varlen_attn(query, key, value, *ends, *longest, **options)
    return output[None]
