"""Wraps functions of a host. Imports nothing heavy, as every process of a host imports it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

#: The call of the original function, and its arguments by name. Changes of them count.
Call = Callable[[], Any]
Arguments = dict[str, Any]


class _Wrapped(wrapt.FunctionWrapper):
    """A function that is wrapped already."""


def wrap(module: ModuleType, name: str, around: Callable[[Call, Arguments], Any]) -> None:
    """Wraps a function of a module, unless it is wrapped already.

    Args:
        module: the module.
        name: the name of the function.
        around: is called in place of the function, and returns what it returns.
    """

    def wrapper(wrapped: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inspect.signature(wrapped).bind(*args, **kwargs)
        return around(lambda: wrapped(*given.args, **given.kwargs), given.arguments)

    if not isinstance(getattr(module, name), _Wrapped):
        wrapt.wrap_object(module, name, _Wrapped, (wrapper,))
