"""Finds the functions and the code that a callable consists of. The descriptions of values and of
models are made from them."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import getattr_static
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn


def package_of(value: Any) -> str:
    """Returns the package that defines a class or a function. A replaced function counts for the
    package of its replacement."""
    name = file_of(value) if isinstance(value, FunctionType) else value.__module__
    return str(name).partition(".")[0]


def file_of(function: Any) -> str:
    """Returns the name of the module whose global variables a function uses."""
    return str(getattr(function, "__globals__", {}).get("__name__"))


def cells(function: FunctionType) -> Iterator[Any]:
    """Yields the values in a function's closure."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the variable is not assigned yet
            continue


def names_in(code: CodeType) -> list[str]:
    """Returns the names that some code, and code nested in it, looks up, each once."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += names_in(constant)
    return list(dict.fromkeys(names))


def functions_of(value: Any) -> Iterator[FunctionType]:
    """Yields the functions that a callable consists of: decorators and the functions that they
    decorate."""
    met: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in met or isinstance(value, (type, nn.Module)):
            continue
        met.add(id(value))
        if isinstance(value, FunctionType):
            yield value
            waiting += cells(value)
        elif isinstance(value, property):
            waiting.append(value.fget)
        elif callable(value) or isinstance(value, (staticmethod, classmethod)):
            waiting += [
                getattr_static(value, name, None) for name in ("__wrapped__", "__func__", "func")
            ]
            if isinstance(value, MethodType):
                waiting.append(value.__func__)


def replaced_forward(module: nn.Module) -> Any:
    """Returns the function that replaces the forward of a module's class, other than accelerate's
    wrappers for placement and autocast; None if there is none."""
    forward = vars(module).get("forward")
    while forward is not None:
        function = getattr(forward, "func", getattr(forward, "__func__", forward))
        file = file_of(function)
        if file == "accelerate.hooks":
            forward = vars(module).get("_old_forward")
        elif file == "accelerate.utils.operations":  # converts the results of autocast to float32
            forward = vars(module).get("_original_forward")
        elif function is getattr(type(module), "forward", None):
            return None
        else:
            break
    return forward
