"""The hooks that autoload.py runs on Axolotl's modules.

Every Axolotl process imports this file, so it imports nothing heavy."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from bdpo_plugin.hosts.axolotl.rewrite_config import PLUGIN, resolve
from bdpo_plugin.hosts.wrapping import Arguments, Call, wrap
from bdpo_plugin.settings import BDPOSettings


def wrap_validate_config(module: ModuleType) -> None:
    """Wraps `axolotl.utils.config.validate_config`, so that `rl: bdpo` activates the plugin."""
    wrap(module, "validate_config", _validate_config)


def _validate_config(call: Call, given: Arguments) -> Any:
    cfg = given["cfg"]
    if cfg.get("rl") == "bdpo":
        from axolotl.integrations.base import PluginManager

        if PLUGIN not in (cfg.get("plugins") or []):
            cfg["plugins"] = [*(cfg.get("plugins") or []), PLUGIN]
        manager = PluginManager.get_instance()
        manager.register(PLUGIN)
        manager.plugins[PLUGIN].register(cfg)
    else:
        resolve(cfg)  # raises if there are keys that Axolotl would silently drop
    return call()


def add_options(module: Any) -> None:
    """Adds the ``--bdpo-...`` options to `axolotl.cli.config_options`, like Axolotl's own ones."""
    module.AXOLOTL_CONFIG_CLI_OPTIONS += tuple(
        ((_option(key, value),), None, None, "B-DPO: see its README.")
        for key, value in BDPOSettings().to_keys().items()
    )


def _option(key: str, default: Any) -> str:
    name = key.replace("_", "-")
    return f"--{name}/--no-{name}" if isinstance(default, bool) else f"--{name}"
