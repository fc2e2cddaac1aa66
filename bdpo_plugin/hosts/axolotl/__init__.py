"""Adapter for Axolotl, activated by ``rl: bdpo`` (see autoload.py) or by the plugin.

The plugin is ``plugins: [bdpo_plugin.BDPOPlugin]``. This package is imported in every Axolotl
process, so it imports its modules only when a name is first used.
"""

from importlib import import_module
from typing import Any

from bdpo_plugin.settings import BDPOError

_PUBLIC = {
    "BDPOPlugin": ".plugin",
    "AxolotlBDPOConfig": ".trainer",
    "AxolotlBDPOTrainer": ".trainer",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_PUBLIC[name], __name__), name)
    except ImportError as error:
        # Axolotl logs a plugin's ImportError and continues without the plugin.
        raise BDPOError(
            f"B-DPO's {name} for Axolotl could not be imported: {error}. Nothing has been trained. "
            "Install what is missing: pip install 'bdpo-plugin[axolotl]'."
        ) from error
    globals()[name] = value
    return value
