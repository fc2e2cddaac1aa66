"""The adapters that make Axolotl, LLaMA-Factory and TRL train with B-DPO."""

from importlib import import_module
from typing import Any


def part(host: str, name: str) -> Any:
    """Imports a module of a host by its name, such as ``side_effects``.

    Modules of the same name have the same functions in each host.

    Args:
        host: ``axolotl``, ``llamafactory`` or ``trl``.
        name: the name of the module.
    """
    return import_module(f"{__name__}.{host}.{name}")
