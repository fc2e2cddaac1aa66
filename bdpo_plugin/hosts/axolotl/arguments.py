"""Declares the ``bdpo_*`` keys to Axolotl's schema, which drops all keys that are not declared."""

from typing import Any

from pydantic import create_model

from bdpo_plugin.hosts.axolotl.rewrite_config import ENTRIES, MARK, WRITTEN
from bdpo_plugin.settings import RECIPE, BDPOSettings

#: Any value is accepted, as only BDPOSettings validates. Axolotl drops keys that are None.
_FIELDS: dict[str, Any] = dict.fromkeys(
    (*BDPOSettings.keys(), RECIPE, MARK, WRITTEN, ENTRIES), (Any, None)
)
BDPOArgs = create_model("BDPOArgs", **_FIELDS)
