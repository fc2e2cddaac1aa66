"""Records what weighs the pairs of a run, for messages and to compare two runs.

Usually these are settings. It may also be a callable of the user's (the trainer's argument
`weigh`), which cannot be recorded completely. Its record has its name, a digest of its source, and
a digest of the data that it computes with, such as captured values.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from platform import python_version
from types import CodeType, FunctionType
from typing import Any

import datasets
import torch
from datasets.fingerprint import Hasher

from bdpo_plugin.reference.callables import names_in
from bdpo_plugin.settings import BDPOSettings

_RELEASES = ", ".join(
    (f"python {python_version()}", f"torch {torch.__version__}", f"datasets {datasets.__version__}")
)
#: The settings that a callable replaces.
OVERRIDDEN = ("bdpo_alpha", "bdpo_weighting", "bdpo_balance", "bdpo_scaling")


def active_settings(settings: BDPOSettings, *, weigh: bool) -> dict[str, Any]:
    """Returns the settings that affect a run, by their keys. The folder of the scores does not,
    nor do, with a callable (`weigh`), the settings that it replaces."""
    without = ("bdpo_cache_dir", *(OVERRIDDEN if weigh else ()))
    return {key: value for key, value in settings.to_keys().items() if key not in without}


def callable_record(given: Callable[..., Any]) -> dict[str, Any]:
    """Returns the record of a callable, as JSON values. Never raises, whatever the callable is.

    It does not depend on memory addresses, so that another process creates the same record for the
    same callable. Functions of the same module that it calls are part of the record. Functions of
    other modules are recorded by name only.

    Returns:
        ``name``: module and qualified name. ``source``: digest of the source code, if it is in a
        file; None for a lambda, as its line may contain other code; its bytecode is part of
        ``content``. ``values``: the numbers that it computes with, by name (captured values,
        defaults, global variables, attributes). ``content``: digest of everything that it computes
        with; None if a part cannot be read. ``made_with``: the releases of packages that
        ``content`` depends on.
    """
    return {
        "name": _or_none(_name, given) or _name(type(given)),
        "source": _or_none(_source, given),
        "values": _or_none(_numbers, given) or {},
        "content": _or_none(lambda given: Hasher.hash(_content(given)), given),
        "made_with": _RELEASES,
    }


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool | None:
    """Whether two records are of different callables. None if that cannot be decided."""
    if any(before[part] != now[part] for part in ("name", "values")):
        return True
    if None not in (before["source"], now["source"]) and before["source"] != now["source"]:
        return True
    if None in (before["content"], now["content"]):
        return None
    if before["content"] == now["content"]:
        return False
    return True if before["made_with"] == now["made_with"] else None


def in_words(record: Mapping[str, Any] | None) -> str:
    """Returns the name in a record, and the details that distinguish it from others of that name;
    "none" if there is no record."""
    if record is None:
        return "none"
    parts = [f"{name} = {value}" for name, value in record["values"].items()]
    digests = [f"{part} {record[part][:8]}" for part in ("source", "content") if record[part]]
    return f"{record['name']} ({', '.join([*parts, *digests]) or 'its source is not known'})"


def _or_none(read: Callable[[Any], Any], given: Any) -> Any:
    """Returns `read(given)`, or None if that raises. A user's object can raise anything."""
    try:
        return read(given)
    except Exception:
        return None


def _inner(given: Any) -> Any:
    """Unwraps partials and methods to the underlying function or object."""
    while isinstance(given, functools.partial) or inspect.ismethod(given):
        given = given.func if isinstance(given, functools.partial) else given.__func__
    return given


def _name(given: Any) -> str:
    given = _inner(given)
    named = given if isinstance(getattr(given, "__qualname__", None), str) else type(given)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def _source(given: Any) -> str | None:
    given = _inner(given)
    if getattr(given, "__name__", None) == "<lambda>":
        return None
    if isinstance(given, FunctionType):
        parts = [inspect.getsource(function.__code__) for function in _functions(given)]
    else:
        parts = [inspect.getsource(cls) for cls in _classes(given)]
    return hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest() if parts else None


def _classes(given: Any) -> list[type]:
    """Returns the class of an object and those of its base classes that are in the same package."""
    kind = given if isinstance(given, type) else type(given)
    package = kind.__module__.partition(".")[0]
    return [cls for cls in kind.__mro__ if cls.__module__.partition(".")[0] == package]


def _functions(function: FunctionType) -> list[FunctionType]:
    """Returns a function and all functions of its module that it calls by name, also indirectly."""
    found = [function]
    for one in found:  # the list grows during the loop
        for name in names_in(one.__code__):
            called = one.__globals__.get(name)
            if not isinstance(called, FunctionType) or called in found:
                continue
            if called.__module__ == function.__module__:
                found.append(called)
    return found


def _content(given: Any) -> Any:
    """Returns the data of a callable to hash. Functions are hashed by their code, not by name."""
    if isinstance(given, functools.partial):
        return "partial", _content(given.func), given.args, given.keywords
    if inspect.ismethod(given):
        return "method", _content(given.__func__), _content(given.__self__)
    if isinstance(given, FunctionType):
        own = _functions(given)
        return [_nowhere(function, own) for function in own]
    if isinstance(given, type) or not hasattr(given, "__dict__"):
        return given
    kinds = [cls.__qualname__ for cls in _classes(given)]
    methods = [m for cls in _classes(given) for m in vars(cls).values()]
    own = [method for method in methods if isinstance(method, FunctionType)]
    own = list({id(f): f for method in own for f in _functions(method)}.values())
    return kinds, [_nowhere(function, own) for function in own], vars(given)


def _nowhere(function: FunctionType, others: list[FunctionType]) -> FunctionType:
    """Returns a copy of a function without its module, so that its code is hashed, not its name.

    Args:
        others: functions that are hashed separately, and so are left out of its globals.
    """
    code, known = _without_file(function.__code__), function.__globals__
    used = {name: known[name] for name in names_in(code) if name in known}
    used = {name: value for name, value in used.items() if not any(value is f for f in others)}
    copied = FunctionType(
        code, used, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__module__ = "__main__"
    return copied


def _without_file(code: CodeType) -> CodeType:
    def constant(value: Any) -> Any:
        if isinstance(value, CodeType):
            return _without_file(value)
        # the order of a frozenset differs between processes
        return tuple(sorted(map(repr, value))) if isinstance(value, frozenset) else value

    constants = tuple(map(constant, code.co_consts))
    return code.replace(co_filename="<weigh>", co_consts=constants)


def _numbers(given: Any) -> dict[str, str]:
    """Returns the representations of the numbers that a callable computes with, by name."""
    found: dict[str, Any] = {}
    while isinstance(given, functools.partial):
        found |= {f"argument {place}": value for place, value in enumerate(given.args)}
        found |= given.keywords
        given = given.func
    if inspect.ismethod(given):
        found |= getattr(given.__self__, "__dict__", {})
        given = given.__func__
    if isinstance(given, FunctionType):
        defaults = inspect.signature(given).parameters.values()
        found |= {p.name: p.default for p in defaults if p.default is not p.empty}
        variables = inspect.getclosurevars(given)
        found |= {**variables.globals, **variables.nonlocals}
    else:
        found |= getattr(given, "__dict__", {})
    kinds = (bool, int, float)
    return {str(name): repr(value) for name, value in found.items() if type(value) in kinds}
