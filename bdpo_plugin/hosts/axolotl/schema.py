"""Which keys Axolotl's schemas know, and what of a configuration they drop without a word."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from axolotl.cli import args as command_line
from axolotl.integrations.base import PluginManager
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.datasets import DPODataset
from pydantic import AliasChoices, BaseModel

from bdpo_plugin.hosts.axolotl import side_effects
from bdpo_plugin.hosts.axolotl.entries import makes_no_difference
from bdpo_plugin.settings import PREFIX

#: What `rl` says where an entry of `datasets` becomes a DPODataset.
PREFERENCE = ("bdpo", "dpo", "ipo", "simpo")
#: What Axolotl's loader reads of an entry of `test_datasets`, whose other keys it keeps unread: it
#: makes text of an evaluation set by the entry of `datasets` in the same position.
_LOADED = ("ds_type", "name", "trust_remote_code")


class Keys(NamedTuple):
    """What a value may have in it.

    Attributes:
        known: the keys of a mapping, and what the value of each may have in it; those of the
            entries where the value is a list. None where a mapping may have any key, or where the
            value is no mapping.
    """

    known: Mapping[str, Keys] | None = None


class Dropped(NamedTuple):
    """A key that Axolotl drops.

    Attributes:
        path: the way to it, as ``("datasets", 0, "roles")``.
        value: what the configuration says.
        known: the keys that there are in its place.
    """

    path: tuple[str | int, ...]
    value: Any
    known: tuple[str, ...]

    @property
    def place(self) -> str:
        """The way to the key in words, as ``datasets[0].roles``."""
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return "".join(parts).removeprefix(".")


def known_keys(rl: str | None = "dpo") -> Keys:
    """Returns all keys that Axolotl knows: those nested in others, those of the entries of lists,
    B-DPO's, and those of the plugins that are registered in this process.

    Args:
        rl: what the configuration says.
    """
    known: dict[str, Keys] = {}
    plugins = PluginManager.get_instance().get_input_args()
    for path in ("bdpo_plugin.hosts.axolotl.arguments.BDPOArgs", *plugins):
        module, _, name = path.rpartition(".")
        known |= of_schema(getattr(import_module(module), name)).known or {}
    known |= of_schema(AxolotlInputConfig).known or {}
    if rl in PREFERENCE:
        entry = of_schema(DPODataset).known or {}
        known["datasets"] = Keys(entry)
        known["test_datasets"] = Keys({**entry, **dict.fromkeys(_LOADED, Keys())})
    # a prefix that Axolotl takes away
    sharding = known["fsdp_config"].known or {}
    known["fsdp_config"] = Keys({**sharding, **{f"fsdp_{key}": sharding[key] for key in sharding}})
    # options of its commands, which come to a configuration from the command line
    for options in vars(command_line).values():
        if isinstance(options, type) and options.__module__ == command_line.__name__:
            known |= {field.name: known.get(field.name, Keys()) for field in fields(options)}
    return Keys(known)


def only_known(value: Any, keys: Keys) -> Any:
    """Returns a value without the keys, nested ones included, that are not among the known."""
    if keys.known is None:
        return value
    if isinstance(value, (list, tuple)):
        return [only_known(entry, keys) for entry in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: only_known(inner, keys.known[key]) for key, inner in value.items() if key in keys.known
    }


def for_sharing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration as others need it to run it again: :func:`side_effects.for_sharing`
    with the keys in it, and in the entries of `datasets`, that a schema of Axolotl knows.

    Args:
        config: as its YAML says, with what the command line changed of it.
    """
    known = dict(known_keys(None).known or {})
    for place in ("datasets", "test_datasets"):  # of any kind; the schemas of `type` are many
        known[place] = Keys({**(known[place].known or {}), "type": Keys()})
    return {
        key: only_known(value, known.get(key, Keys()))
        for key, value in side_effects.for_sharing(config).items()
    }


def dropped_keys(config: Mapping[str, Any]) -> list[Dropped]:
    """Returns what Axolotl drops of a configuration without a word.

    Keys of None, those beginning with ``_`` (which are for YAML's anchors), and those of B-DPO,
    which are checked elsewhere, are not among it.

    Args:
        config: as its YAML says, before Axolotl validates it.
    """
    found = _dropped(config, known_keys(config.get("rl")), ())
    return [
        each
        for each in found
        if len(each.path) > 1 or not str(each.path[0]).startswith((PREFIX, "_"))
    ]


def without_effect(config: Mapping[str, Any]) -> list[Dropped]:
    """Returns the keys of a configuration that have no effect on a run, as Axolotl drops them.

    Of the entries of `datasets`, B-DPO gives back or refuses what Axolotl drops (see entries.py):
    they are looked at where the run is another.

    Args:
        config: as its YAML says, before Axolotl validates it.
    """
    found = []
    for each in dropped_keys(config):
        place, number, key = (*each.path, None, None)[:3]
        if place in ("datasets", "test_datasets") and (
            config.get("rl") == "bdpo" or makes_no_difference(config[place][number], key)
        ):
            continue
        found.append(each)
    return found


def dropped_words(config: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each key of :func:`without_effect`."""
    words = []
    for each in without_effect(config):
        near = difflib.get_close_matches(str(each.path[-1]), each.known, n=1)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        words.append(f"`{each.place}` has no effect: Axolotl drops it.{meant}")
    return words


def of_schema(schema: type[BaseModel]) -> Keys:
    """Returns the keys that a schema of pydantic knows, aliases included."""
    if schema.model_config.get("extra") == "allow":
        return Keys()
    known: dict[str, Keys] = {}
    for name, field in schema.model_fields.items():
        keys = _of_type(field.annotation)
        names = {name, field.alias}
        if isinstance(field.validation_alias, AliasChoices):
            names |= {alias for alias in field.validation_alias.choices if isinstance(alias, str)}
        known |= dict.fromkeys((name for name in names if name), keys)
    return Keys(known)


def _of_type(annotation: Any) -> Keys:
    """The keys that a value of a type may have; those of all of them for a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return of_schema(annotation)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _of_type(inner[0])
    if origin in (Union, types.UnionType, list, tuple, Sequence):
        kinds = [_of_type(each) for each in inner]
        known = [keys.known for keys in kinds if keys.known is not None]
        if known and not any(map(_is_free, inner)):
            return Keys({name: keys for mapping in known for name, keys in mapping.items()})
    return Keys()


def _is_free(annotation: Any) -> bool:
    """Whether a type is that of a mapping with any key."""
    return annotation is Any or annotation is dict or get_origin(annotation) is dict


def _dropped(value: Any, keys: Keys, path: tuple[str | int, ...]) -> Iterator[Dropped]:
    if keys.known is None:
        return
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _dropped(entry, keys, (*path, number))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key in keys.known:
                yield from _dropped(inner, keys.known[key], (*path, key))
            elif inner is not None:
                yield Dropped((*path, str(key)), inner, tuple(keys.known))
