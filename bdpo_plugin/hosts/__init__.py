"""The adapters that make Axolotl, LLaMA-Factory and TRL train with B-DPO."""

from importlib import import_module
from typing import Any

_HOSTS = ("axolotl", "llamafactory", "trl")
_NAMES = (
    *("arguments", "inspection", "limits", "plan", "recipe_validation", "rewrite_config"),
    *("scoring", "side_effects"),
)
#: Host and name of a module -> its whole name. No other module is imported by :func:`part`.
_PARTS = {(host, name): f"{__name__}.{host}.{name}" for host in _HOSTS for name in _NAMES}


def part(host: str, name: str) -> Any:
    """Imports a module of a host by its name, such as ``side_effects``.

    Modules of the same name have the same functions in each host.

    Args:
        host: ``axolotl``, ``llamafactory`` or ``trl``.
        name: the name of the module.
    """
    return import_module(_PARTS[host, name])
