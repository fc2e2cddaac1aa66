"""What `bdpo doctor` reports of one check."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bdpo_plugin.settings import PREFIX, BDPOError, BDPOSettings

OK, WARNING, FAILED, UNKNOWN = "ok", "warning", "failed", "not known"


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        name: the name of the check.
        state: one of :data:`OK`, :data:`WARNING`, :data:`FAILED` and :data:`UNKNOWN`.
        words: a message.
        fix: lines of YAML or of a shell that can be copied, or a sentence; empty if nothing has to
            be done, or if the message alone says what.
    """

    name: str
    state: str
    words: str
    fix: str = ""


#: How our messages name a remedy that is a key with its value; a misspelt key; a value of a key of
#: ours that cannot be used; and a length that is too short.
_REMEDY = re.compile(r"\b(?:Write|Set|Did you mean) `(\w+: [^`]+)`")
_MISSPELT = re.compile(r"Unknown key `(\w+)`\. Did you mean `(\w+)`\?")
_REFUSED = re.compile(rf"`({PREFIX}\w+): .*` cannot be used: it must be (.*)")
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SHORT = re.compile(r"\bRaise `(\w+)`")


def fix_in(message: str, keys: Mapping[str, Any]) -> str:
    """Returns the line of YAML that a message about a configuration asks for, or an empty text.

    Args:
        message: the message of an error.
        keys: the configuration.
    """
    if (found := _MISSPELT.search(message)) and found[1] in keys:
        return f"{found[2]}: {keys[found[1]]}  # in place of {found[1]}"
    if (found := _REFUSED.search(message)) and found[1] in keys:
        return _usable(found[1], str(keys[found[1]]), re.findall("'([^']+)'", found[2]))
    if (found := _SHORT.search(message)) and isinstance(length := keys.get(found[1]), int):
        return f"{found[1]}: {2 * length}  # twice as long"
    return found[1] if (found := _REMEDY.search(message)) else ""


def _usable(key: str, value: str, choices: Sequence[str]) -> str:
    """Returns the line with a value near to the one that was refused, or else with the default."""
    near = difflib.get_close_matches(value, choices, n=1)
    default = BDPOSettings().to_keys()[key]
    for usable, comment in (
        *((choice, "") for choice in near),
        (_SWITCHES.get(value.lower()), ""),  # written in quotation marks
        (default, "  # the default"),
    ):
        with contextlib.suppress(BDPOError):
            if usable is not None or comment:
                BDPOSettings.from_keys({key: usable})
                return f"{key}: {json.dumps(usable)}".replace('"', "") + comment
    return ""
