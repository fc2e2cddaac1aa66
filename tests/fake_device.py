"""A device that is none: its tensors say that they are on ``meta`` and hold tensors of the CPU. So
the branches for a GPU run anywhere, operations that mix devices fail as on a GPU, and each place
is noted where a GPU would be waited for."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")

#: Operations whose result, or its size, the host has to know.
_WAITING = (
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "bincount"),
    *("equal", "is_nonzero", "allclose"),
)
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")

_waits: Counter[str] = Counter()


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` is on the CPU."""

    @staticmethod
    def __new__(cls, held, **_):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE
        )

    def __init__(self, held):
        self.held = held

    def tolist(self):
        _note("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """For what makes a tensor on the device of none."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Attention(torch.autograd.Function):
    """torch's own, on what the tensors hold."""

    @staticmethod
    def forward(ctx, query, key, value, options):
        with torch.enable_grad():
            ctx.given = [t.held.detach().requires_grad_() for t in (query, key, value)]
            ctx.made = _attention(*ctx.given, **tree_map(_held, options))
        return OnDevice(ctx.made.detach())

    @staticmethod
    def backward(ctx, upstream):
        found = torch.autograd.grad(ctx.made, ctx.given, upstream.held, retain_graph=True)
        return (*map(OnDevice, found), None)


_attention, _tensor = F.scaled_dot_product_attention, torch.tensor


def _attend(query, key, value, **options):
    if isinstance(query, OnDevice):
        return _Attention.apply(query, key, value, options)
    return _attention(query, key, value, **options)


def _made(*args, device=None, **kwargs):
    """Of torch.tensor, which no mode sees."""
    if device is None or torch.device(device) != DEVICE:
        return _tensor(*args, device=device, **kwargs)
    _note("torch.tensor on the device")
    return OnDevice(_tensor(*args, **kwargs))


@contextmanager
def device_in_use():
    """The places that wait for the device, in here: a counter, filled as they come."""
    _waits.clear()
    with (
        patch.object(F, "scaled_dot_product_attention", _attend),
        patch.object(torch, "tensor", _made),
        # which is not known of such a device
        patch.object(torch, "is_autocast_enabled", lambda *_: False),
        # the backward pass in this thread, where the mode is
        torch.autograd.set_multithreading_enabled(False),
        _Everywhere(),
    ):
        yield _waits


def put(model):
    """The model on the device."""
    moved = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = moved.setdefault(
                    id(parameter),
                    torch.nn.Parameter(OnDevice(parameter.data), parameter.requires_grad),
                )
                module._parameters[name] = own
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return model


def _note(what):
    """With the line that asked for it, of whichever package but torch."""
    lines = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    _waits[f"{what} at {lines[-1]}"] += 1


def _held(value):
    if isinstance(value, OnDevice):
        return value.held
    return torch.device("cpu") if value == DEVICE and isinstance(value, torch.device) else value


def _run(operation, args, kwargs):
    name = operation.__name__.split(".")[0]
    tensors = []
    tree_map(lambda v: tensors.append(v) if isinstance(v, torch.Tensor) else None, (args, kwargs))
    of_device = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    to = kwargs.get("device")
    if name == "_to_copy" and to is not None:
        on_device = torch.device(to) == DEVICE
        if of_device and not on_device:
            _note("a copy from the device")
        elif on_device and not of_device and not kwargs.get("non_blocking"):
            _note("a copy to the device that is waited for")
    else:
        on_device = bool(of_device) or (to is not None and torch.device(to) == DEVICE)
        if of_device:
            _check(name, tensors, args)
    if not on_device and not of_device:
        return operation(*args, **kwargs)
    found = operation(*tree_map(_held, args), **tree_map(_held, kwargs))
    known = {id(tensor.held): tensor for tensor in of_device}  # in place, or the same

    def back(value):
        if not isinstance(value, torch.Tensor) or not on_device:
            return value
        return known.get(id(value)) if id(value) in known else OnDevice(value)

    return tree_map(back, found)


def _check(name, tensors, args):
    """Note what waits, and refuse what a device refuses."""
    if name in _WAITING:
        _note(name)
    indices = [i for i in args[1] if i is not None] if name in _INDEXING else []
    if any(i.dtype == torch.bool for i in indices):
        _note(f"{name} by a mask")
    for tensor in tensors:
        if not isinstance(tensor, OnDevice) and tensor.device == DEVICE:
            raise RuntimeError(f"{name}: a tensor of the device was made where nothing is seen")
        if tensor.dim() and not isinstance(tensor, OnDevice):
            if any(tensor is i for i in indices):
                _note(f"{name} by indices of the CPU")
            elif name not in ("copy_",):
                raise RuntimeError(f"{name}: all tensors have to be on one device")
