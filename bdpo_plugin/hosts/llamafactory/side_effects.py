"""Removes the keys of a LLaMA-Factory configuration that have side effects. See
hosts/side_effects.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.hosts.side_effects import KeyGroups

_GROUPS = KeyGroups.of("llamafactory")
DROPPED, SAVES, SHARES, OTHERS, WRITES = _GROUPS
KEYS = _GROUPS.keys

#: Keys that hold a user's login tokens for a hub.
_LOGINS = ("hf_hub_token", "ms_hub_token", "om_hub_token")


def for_sharing(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a configuration that others need to run it again, see
    :meth:`KeyGroups.for_sharing`, without login tokens."""
    return _GROUPS.for_sharing(keys, unshared=_LOGINS)


def without_side_effects(keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a configuration without side effects, see :meth:`KeyGroups.without_side_effects`.

    Data that was tokenised before is only read, and so stays."""
    kept = _GROUPS.without_side_effects(keys, folder)
    del kept["tokenized_path"]
    if (path := tokenised_data(keys)) is not None:
        kept["tokenized_path"] = path
    return kept | {"report_to": "none", "overwrite_output_dir": True}


def tokenised_data(keys: Mapping[str, Any]) -> str | None:
    """Returns the `tokenized_path` of a configuration if that folder has data, else None.

    If it has, training reads that data and ignores the other keys about data. If not, training
    would write it."""
    path = keys.get("tokenized_path")
    if path is None or not Path(path).is_dir() or not any(Path(path).iterdir()):
        return None
    return str(path)
