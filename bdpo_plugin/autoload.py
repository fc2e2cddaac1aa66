"""The package's entry point: PyTorch calls :func:`install` at the end of `import torch`.

It registers hooks that run once a host is imported and that make the host accept `rl: bdpo`
(LLaMA-Factory: `pref_loss: bdpo`) without any other key. A program that only imports torch pays for
reading this file and nothing more. The file uses the standard library and wrapt only and never
raises, as an exception here would break `import torch`. ``BDPO_AUTOLOAD=0`` turns it off.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

_LLAMAFACTORY = "bdpo_plugin.hosts.llamafactory.hooks"
_ARGUMENTS = "llamafactory.hparams.finetuning_args"

#: Module of a host -> the hook ("module:function") that is called with it once it is imported.
HOOKS = {
    "axolotl.utils.config": "bdpo_plugin.hosts.axolotl.hooks:wrap_validate_config",
    "axolotl.cli.config_options": "bdpo_plugin.hosts.axolotl.hooks:add_options",
    _ARGUMENTS: f"{_LLAMAFACTORY}:put_arguments",
    "llamafactory.hparams.parser": f"{_LLAMAFACTORY}:wrap_functions",
    "llamafactory.train.dpo.trainer": f"{_LLAMAFACTORY}:wrap_functions",
    "llamafactory.train.dpo.workflow": f"{_LLAMAFACTORY}:wrap_functions",
    "llamafactory.data.loader": f"{_LLAMAFACTORY}:wrap_functions",
    "llamafactory.webui.components.train": f"{_LLAMAFACTORY}:wrap_functions",
    "llamafactory.webui.common": f"{_LLAMAFACTORY}:wrap_functions",
}


def install() -> None:
    """Registers the hooks of :data:`HOOKS`. A failure becomes a warning, not an exception."""
    if os.environ.get("BDPO_AUTOLOAD", "1") == "0":
        return
    try:
        for name, hook in HOOKS.items():
            _when_imported(name, _guarded(hook))
    except Exception as error:
        _warn(error)


def _when_imported(name: str, hook: Callable[[ModuleType], None]) -> None:
    import wrapt

    module = sys.modules.get(name)
    if module is not None and getattr(module.__spec__, "_initializing", False):
        # `name` imported torch and is not fully imported itself: wrapt would call the hook at once,
        # with the incomplete module.
        _when_bound(*name.rpartition(".")[::2], hook)
    else:
        wrapt.register_post_import_hook(hook, name)


def _when_bound(parent_name: str, child: str, hook: Callable[[ModuleType], None]) -> None:
    """Calls ``hook`` when the import system sets the complete submodule on its parent module."""
    parent: Any = sys.modules[parent_name]
    before: Any = parent.__class__

    class Waiting(before):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == child:
                self.__class__ = before
                hook(value)

    parent.__class__ = Waiting


def _guarded(hook: str) -> Callable[[ModuleType], None]:
    def call(module: ModuleType) -> None:
        try:
            path, function = hook.split(":")
            getattr(import_module(path), function)(module)
        except Exception as error:
            _warn(error)
            if module.__name__ == _ARGUMENTS:
                _refuse(module.FinetuningArguments, error)

    return call


def _refuse(arguments: Any, error: Exception) -> None:
    """Makes LLaMA-Factory refuse `pref_loss: bdpo`, as it trains `sigmoid` for an unknown loss."""
    theirs, reason = arguments.__post_init__, repr(error)

    def __post_init__(self: Any) -> None:
        if self.pref_loss == "bdpo":
            raise ValueError(
                "This run asked for B-DPO, which could not hook into LLaMA-Factory: "
                f"{reason}. Nothing has been trained. Reinstall bdpo-plugin."
            )
        theirs(self)

    arguments.__post_init__ = __post_init__


def _warn(error: Exception) -> None:
    warnings.warn(
        "B-DPO could not hook into its host, which will not know `rl: bdpo` (LLaMA-Factory: "
        f"`pref_loss: bdpo`): {error!r}. Reinstall bdpo-plugin, or set BDPO_AUTOLOAD=0 to silence "
        "this.",
        RuntimeWarning,
        stacklevel=2,
    )
