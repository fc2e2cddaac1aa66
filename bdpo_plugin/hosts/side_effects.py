"""The keys of each host's configuration, in groups by the side effects that they cause.

A host's groups are in its `keys.yml`. Commands that do not train (`bdpo doctor`, `bdpo mi`,
`bdpo recipes check --run`) remove the keys of most groups. Nothing of a host is imported, so that a
configuration can be read where the host is not installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bdpo_plugin.settings import RECIPE, BDPOSettings


class KeyGroups(NamedTuple):
    """The keys that a host knows, except those of B-DPO. Each key is in one group.

    Attributes:
        dropped: keys that a command which does not train removes.
        saves: keys about saving into the output folder.
        shares: keys that distribute a model over processes.
        others: keys without side effects.
        writes: keys of output folders -> their names in the temporary folder of a command.
    """

    dropped: frozenset[str]
    saves: frozenset[str]
    shares: frozenset[str]
    others: frozenset[str]
    writes: dict[str, str]

    @classmethod
    def of(cls, host: str) -> KeyGroups:
        """Reads the groups of a host: ``axolotl``, ``llamafactory`` or ``trl``."""
        file = Path(__file__).parent / host / "keys.yml"
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
        writes = read.pop("writes")
        groups = {name: frozenset(words.split()) for name, words in read.items()}
        saves, shares, others = (groups.pop(n, frozenset()) for n in ("saves", "shares", "others"))
        return cls(frozenset().union(*groups.values()), saves, shares, others, writes)

    @property
    def keys(self) -> frozenset[str]:
        """The keys of all groups."""
        return frozenset().union(*self)

    def for_sharing(self, keys: Mapping[str, Any], unshared: Iterable[str] = ()) -> dict[str, Any]:
        """Returns the part of a configuration that others need to run it again.

        These are the keys that the host and B-DPO know, without those that have side effects.

        Args:
            keys: the configuration, as the YAML file has it.
            unshared: further keys to leave out.
        """
        needed = {*(self.keys - self.dropped), *BDPOSettings.keys(), RECIPE}.difference(unshared)
        return {key: value for key, value in keys.items() if key in needed}

    def without_side_effects(self, keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Returns a configuration without side effects that writes into a temporary folder.

        Unknown keys stay, so that the host reports them.

        Args:
            keys: the configuration, as the YAML file has it.
            folder: the temporary folder.
        """
        kept = {key: value for key, value in keys.items() if key not in self.dropped}
        return kept | {key: str(folder / name) for key, name in self.writes.items()}
