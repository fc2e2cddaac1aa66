"""The keys that Axolotl's schema must keep: it drops what nobody declares."""

from typing import Any

from pydantic import create_model

from bdpo_plugin.hosts.axolotl.rewrite_config import ENTRIES, MARK, WRITTEN
from bdpo_plugin.settings import RECIPE, BDPOSettings

#: Any value, None where left out (and then dropped again): BDPOSettings alone validates.
_FIELDS: dict[str, Any] = dict.fromkeys(
    (*BDPOSettings.keys(), RECIPE, MARK, WRITTEN, ENTRIES), (Any, None)
)
BDPOArgs = create_model("BDPOArgs", **_FIELDS)
