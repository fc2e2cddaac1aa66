"""Balanced Direct Preference Optimization for Axolotl, LLaMA-Factory and TRL.

The public names are imported on first use, so that ``import bdpo_plugin`` imports no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BDPOConfig": "bdpo_plugin.hosts.trl",
    "BDPOTrainer": "bdpo_plugin.hosts.trl",
    "BDPOPlugin": "bdpo_plugin.hosts.axolotl",
    "BDPOError": "bdpo_plugin.settings",
    "BDPOSettings": "bdpo_plugin.settings",
    "BalanceWeights": "bdpo_plugin.objective",
    "ChosenRejected": "bdpo_plugin.objective",
    "balance_weights": "bdpo_plugin.objective",
    "bdpo_loss": "bdpo_plugin.objective",
    "mutual_information": "bdpo_plugin.objective",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
