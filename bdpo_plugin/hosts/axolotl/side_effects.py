"""Removes the keys of an Axolotl configuration that have side effects. See
hosts/side_effects.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.hosts.side_effects import KeyGroups

_GROUPS = KeyGroups.of("axolotl")
DROPPED, SAVES, SHARES, OTHERS, WRITES = _GROUPS
KEYS = _GROUPS.keys

#: Axolotl's own plugins with side effects: they report, serve, or clone and start what they need.
PLUGINS = tuple(
    f"axolotl.integrations.{name}." for name in ("hatchery", "lm_eval", "nemo_gym", "swanlab")
)


def for_sharing(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a configuration that others need to run it again, see
    :meth:`KeyGroups.for_sharing`, without the plugins of :data:`PLUGINS`."""
    return _GROUPS.for_sharing(keys, unshared=("axolotl_config_path",)) | _plugins(keys)


def without_side_effects(keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a configuration without side effects, see :meth:`KeyGroups.without_side_effects`.

    Plugins of others stay, and may do anything, as in training."""
    return _GROUPS.without_side_effects(keys, folder) | _plugins(keys)


def _plugins(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `plugins` key without the plugins of :data:`PLUGINS`, if it is a list."""
    if not isinstance(plugins := keys.get("plugins"), list):
        return {}
    return {"plugins": [name for name in plugins if not str(name).startswith(PLUGINS)]}
