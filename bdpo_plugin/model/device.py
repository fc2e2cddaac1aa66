"""Tensors on their way to a device, and the dtypes of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. CUDA takes over what it gets from the CPU before the copy, and need
    not finish what is queued for that; of others it is not known."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Gives the parameters, at the end, the dtypes that they had: PEFT reads an adapter in
    bfloat16, as TRL keeps that of QLoRA, into one in float32."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
