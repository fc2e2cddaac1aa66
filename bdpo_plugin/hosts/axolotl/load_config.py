"""Loads an Axolotl configuration with Axolotl's own functions, for commands that do not train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.telemetry.manager import TelemetryManager

from bdpo_plugin.hosts.axolotl.rewrite_config import PLUGIN
from bdpo_plugin.hosts.axolotl.side_effects import without_side_effects
from bdpo_plugin.settings import BDPOError


def load_without_side_effects(keys: Mapping[str, Any], folder: Path, **changes: Any) -> Any:
    """Returns the configuration as Axolotl validates it, without its side effects.

    Args:
        keys: the configuration, as the YAML file has it.
        folder: a temporary folder, which must exist as long as the configuration is used.
        changes: keys to change. None removes a key.

    Raises:
        BDPOError: a plugin that the configuration names cannot be imported.
    """
    # `axolotl bdpo ...` has imported Axolotl before our command could turn its telemetry off
    TelemetryManager.get_instance().enabled = False
    kept = without_side_effects(keys, folder) | changes
    kept = {key: value for key, value in kept.items() if value is not None}
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), encoding="utf-8")
    try:
        return load_cfg(str(file))
    finally:
        # Axolotl logs a plugin that it cannot import, and continues without it
        loaded = PluginManager.get_instance().plugins
        if missing := [name for name in kept.get("plugins") or [] if name not in loaded]:
            raise BDPOError(
                f"`plugins: [{', '.join(missing)}]` cannot be imported. B-DPO's is `{PLUGIN}`, and "
                "its package has to be installed, whole, in this environment."
            )
