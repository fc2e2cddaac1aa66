"""Helpers that move tensors to a device and that keep the dtypes of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on a device. The copy is non-blocking on CUDA alone.

    CUDA stages memory that is not pinned before it returns, so that the source may be changed or
    freed at once, and it does not wait for the queued kernels. We do not know whether other devices
    do so.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


@contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Restores the dtypes of the parameters on exit.

    Needed because PEFT loads an adapter in bfloat16, the dtype in which TRL keeps QLoRA adapters,
    as float32.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
