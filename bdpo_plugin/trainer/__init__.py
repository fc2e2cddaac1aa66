"""B-DPO for TRL: :class:`BDPOConfig` and :class:`BDPOTrainer`.

The names are imported on first use: a host with a trainer of its own imports the modules beside
them without TRL's.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {"BDPOArguments": ".config", "BDPOConfig": ".config", "BDPOTrainer": ".trainer"}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value
