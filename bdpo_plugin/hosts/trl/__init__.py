"""B-DPO for TRL: :class:`BDPOConfig` and :class:`BDPOTrainer`.

TRL takes seconds to import, so a module is imported only when a name of it is first used.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {"BDPOArguments": ".config", "BDPOConfig": ".config", "BDPOTrainer": ".trainer"}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)
