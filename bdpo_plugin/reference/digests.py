"""Describes any value as text that is the same in every process, and tensors by a digest of their
content. The fingerprint of a reference model is made from these."""

from __future__ import annotations

import functools
import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bdpo_plugin.redact import digest_of
from bdpo_plugin.reference.callables import cells, file_of, package_of

_WIDTH = 4096
_BLOCK = 2**22
#: Types that decide where and when something runs or is logged, and do not affect the results.
_WITHOUT_CONTENT = (torch.device, torch.Stream, torch.Event, logging.Logger)

#: Longer texts are replaced by their digest; number of characters.
_LONG = 200


class Words:
    """Describes values as text: functions by their code, objects by their content.

    Attributes:
        strict: whether an object in a function's closure or defaults that shows only its address
            is an error; if False, its class is named instead.
    """

    def __init__(self, *, strict: bool = True) -> None:
        self.strict = strict
        # id -> (object, text); the reference keeps the object alive, so that its id stays unique
        self._known: dict[int, tuple[Any, str]] = {}
        self._open: set[int] = set()

    def of(self, value: Any) -> str:
        """Describes a value.

        Raises:
            TypeError: The value, or a part of it, shows only its address.
        """
        if isinstance(value, (Enum, torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if value is None or isinstance(value, (bool, int, float, complex, bytes, str)):
            return repr(value)
        if isinstance(value, _WITHOUT_CONTENT) or type(value).__module__ == "_thread":
            return type(value).__name__
        return self.once(value, self._of_object)

    def once(self, value: Any, words: Callable[[Any], str]) -> str:
        """Describes an object by calling `words` once, and then from a cache. An object that occurs
        within itself is described by its class there."""
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._open:
            return f"this {type(value).__qualname__}"
        self._open.add(id(value))
        try:
            text = words(value)
        finally:
            self._open.discard(id(value))
        text = text if len(text) <= _LONG else digest_of(text)
        self._known[id(value)] = (value, text)
        return text

    def _of_object(self, value: Any) -> str:
        if isinstance(value, Mapping):
            return (
                f"{{{', '.join(sorted(f'{self.of(k)}: {self.of(v)}' for k, v in value.items()))}}}"
            )
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(map(self.of, value)))}}}"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(map(self.of, value))})"
        if isinstance(value, Tensor):
            return tensor_digest(value).hex()
        if isinstance(value, nn.Module):
            return type(value).__qualname__
        if isinstance(value, type):
            return value.__qualname__
        if isinstance(value, ModuleType):
            return f"module {value.__name__.rpartition('.')[2]}"
        if isinstance(value, weakref.ReferenceType):
            return f"reference to a {type(value()).__qualname__}"
        if isinstance(value, CodeType):
            return self._of_code(value)
        if callable(value) and (words := self._of_function(value)):
            return words
        return f"{type(value).__qualname__} {self._of_content(value)}"

    def _of_content(self, value: Any) -> str:
        """Describes an object of any other class by its dataclass fields, by its repr if its class
        defines one without an address, or by its attributes and methods.

        Raises:
            TypeError: The object shows only its address.
        """
        if is_dataclass(value):
            return self.of(
                {field.name: getattr(value, field.name, None) for field in fields(value)}
            )
        words = repr(value)
        of_its_own: Any = type(value).__repr__
        if of_its_own is not object.__repr__ and " at 0x" not in words:
            return repr(words)
        if hasattr(value, "__dict__"):
            methods = [one for one in vars(type(value)).values() if isinstance(one, FunctionType)]
            return self.of([dict(vars(value)), *methods])
        raise TypeError(f"it depends on {words}, which shows no content")

    def _of_function(self, value: Any) -> str:
        """Describes a function or another known callable; returns an empty string for objects of
        other classes."""
        if isinstance(value, FunctionType):
            if transparent(value):
                return self.of(getattr(value, "__wrapped__", None))
            given = (value.__defaults__, value.__kwdefaults__, *cells(value))
            parts = [value.__code__, *map(self._closed_over, given)]
            return f"{value.__qualname__} {self.of(parts)}"
        if isinstance(value, functools.partial):
            return f"partial {self.of([value.func, value.args, value.keywords])}"
        if isinstance(value, MethodType):
            owner = value.__self__
            if isinstance(owner, (nn.Module, type)):
                return self.of(value.__func__)
            return f"{self.of(value.__func__)} of {self.of(owner)}"
        if isinstance(value, BuiltinFunctionType):
            return f"{value.__module__}.{value.__qualname__}"
        for name in ("__wrapped__", "_torchdynamo_orig_callable", "fn"):
            if callable(inner := getattr(value, name, None)):
                return f"{type(value).__qualname__} of {self.of(inner)}"
        named = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
        known = package_of(type(value)) in ("builtins", "numpy", "torch", "triton")
        return f"{type(value).__qualname__} {named}" if known and isinstance(named, str) else ""

    def _closed_over(self, value: Any) -> str:
        try:
            return self.of(value)
        except TypeError:
            if self.strict:
                raise
            return type(value).__qualname__

    def _of_code(self, code: CodeType) -> str:
        names = (code.co_names, code.co_varnames, code.co_freevars)
        return self.of([code.co_code, code.co_consts, *names])


def transparent(function: FunctionType) -> bool:
    """Whether a function is a wrapper of this package, which does not change the results of the
    function that it wraps."""
    return file_of(function).startswith("bdpo_plugin.") and hasattr(function, "__wrapped__")


def tensor_digest(tensor: Tensor) -> bytes:
    """Digest of a tensor's shape, dtype and values. For a tensor that wraps other tensors, the
    digest covers these and the data that says how they are combined.

    Raises:
        RuntimeError, TypeError and others: The values cannot be read, or it is not known what they
            mean.
    """
    wraps: bool = is_traceable_wrapper_subclass(tensor)
    package = type(tensor).__module__.partition(".")[0]
    if package not in ("torch", "bitsandbytes") and not wraps and vars(tensor):
        raise TypeError("what its class makes of its bytes is not known")
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
        wraps = is_traceable_wrapper_subclass(tensor)
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    if wraps:
        flatten: Any = tensor.__tensor_flatten__  # type: ignore[attr-defined]
        names, context = flatten()
        digest.update(Words().of((type(tensor).__qualname__, names, context)).encode())
        for name in names:
            digest.update(tensor_digest(getattr(tensor, name)))
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise TypeError("only dense tensors of real numbers can be read")
    else:
        digest.update(_bytes_digest(tensor.resolve_neg().contiguous().view(-1).view(torch.uint8)))
    return digest.digest()


def _bytes_digest(raw: Tensor) -> bytes:
    if raw.is_meta:
        raise TypeError("its values are not here")
    if raw.numel() and not raw.data_ptr():  # it wraps other tensors and does not name them
        raise TypeError("it has no bytes")
    if raw.storage_offset() % 4:
        raw = raw.clone()
    whole = raw.numel() // 4 * 4
    digest = hashlib.blake2b(raw[whole:].cpu().numpy().tobytes(), digest_size=16)
    # 32-bit words are summed in 64 bits, so that the highest bit of a word counts like the others
    words = raw[:whole].view(torch.int32)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (_WIDTH,), generator=generator) | 1
    factors = factors.to(raw.device)
    for block in words.split(_BLOCK):
        full = block.numel() // _WIDTH * _WIDTH
        # overflow wraps around, as intended for a hash
        rows = (block[:full].view(-1, _WIDTH) * factors).sum(dim=1)
        rest = (block[full:] * factors[: block.numel() - full]).sum()
        digest.update(torch.cat([rows, rest[None]]).cpu().numpy().tobytes())
    return digest.digest()
