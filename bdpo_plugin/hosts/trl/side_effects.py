"""Removes the keys of a TRL configuration (`bdpo train`) that have side effects. See
hosts/side_effects.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.hosts.side_effects import KeyGroups

_GROUPS = KeyGroups.of("trl")
DROPPED, SAVES, SHARES, OTHERS, WRITES = _GROUPS
KEYS = _GROUPS.keys
for_sharing = _GROUPS.for_sharing


def without_side_effects(keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a configuration without side effects, see :meth:`KeyGroups.without_side_effects`."""
    return _GROUPS.without_side_effects(keys, folder) | {"report_to": "none"}
