"""Tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. CUDA takes over what it gets from the CPU before the copy, and need
    not finish what is queued for that; of others it is not known."""
    return tensor.to(device, non_blocking=device.type == "cuda")
