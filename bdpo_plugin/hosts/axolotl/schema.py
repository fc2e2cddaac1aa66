"""Finds the keys of a configuration that Axolotl's schemas do not know and silently drop."""

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

#: Values of `rl` with which Axolotl validates an entry of `datasets` as a DPODataset.
PREFERENCE = ("bdpo", "dpo", "ipo", "simpo")
#: Further keys that Axolotl's loader reads from an entry of `test_datasets`. It ignores the other
#: ones, as it formats an evaluation set with the entry of `datasets` in the same position.
_LOADED = ("ds_type", "name", "trust_remote_code")


#: The keys that a value may contain. For a mapping, each key and what its value may contain; for a
#: list, the keys of its entries. None for a mapping that may have any key, and for other values.
Keys = Mapping[str, "Keys"] | None


class Dropped(NamedTuple):
    """A key that Axolotl drops.

    Attributes:
        path: the path of the key, such as ``("datasets", 0, "roles")``.
        value: its value in the configuration.
        known: the keys that would be allowed in its place.
    """

    path: tuple[str | int, ...]
    value: Any
    known: tuple[str, ...]

    @property
    def place(self) -> str:
        """The path of the key as text, such as ``datasets[0].roles``."""
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return "".join(parts).removeprefix(".")


def known_keys(rl: str | None = "dpo") -> dict[str, Keys]:
    """Returns all keys that Axolotl knows, including nested ones and those of list entries.

    Includes the keys of B-DPO and of the plugins that are registered in this process.

    Args:
        rl: the value of `rl` in the configuration.
    """
    known: dict[str, Keys] = {}
    plugins = PluginManager.get_instance().get_input_args()
    for path in ("bdpo_plugin.hosts.axolotl.arguments.BDPOArgs", *plugins):
        module, _, name = path.rpartition(".")
        known |= of_schema(getattr(import_module(module), name)) or {}
    known |= of_schema(AxolotlInputConfig) or {}
    if rl in PREFERENCE:
        entry = of_schema(DPODataset) or {}
        known["datasets"] = entry
        known["test_datasets"] = {**entry, **dict.fromkeys(_LOADED)}
    # Axolotl strips this prefix
    sharding = known["fsdp_config"] or {}
    known["fsdp_config"] = {**sharding, **{f"fsdp_{key}": sharding[key] for key in sharding}}
    # options of Axolotl's commands, which the command line adds to a configuration
    for options in vars(command_line).values():
        if isinstance(options, type) and options.__module__ == command_line.__name__:
            known |= {field.name: known.get(field.name) for field in fields(options)}
    return known


def only_known(value: Any, keys: Keys) -> Any:
    """Returns a value without the unknown keys in it, nested ones included."""
    if keys is None:
        return value
    if isinstance(value, (list, tuple)):
        return [only_known(entry, keys) for entry in value]
    if not isinstance(value, Mapping):
        return value
    return {key: only_known(inner, keys[key]) for key, inner in value.items() if key in keys}


def for_sharing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a configuration that others need to run it again.

    This is :func:`side_effects.for_sharing` without keys that no schema of Axolotl knows, at the
    top level and in the entries of `datasets`.

    Args:
        config: the configuration as its YAML file has it, with changes from the command line.
    """
    known = known_keys(None)
    for place in ("datasets", "test_datasets"):  # `type` is not checked, as it has many schemas
        known[place] = {**(known[place] or {}), "type": None}
    return {
        key: only_known(value, known.get(key))
        for key, value in side_effects.for_sharing(config).items()
    }


def dropped_keys(config: Mapping[str, Any]) -> list[Dropped]:
    """Returns the keys of a configuration that Axolotl silently drops.

    Ignores keys whose value is None, keys that begin with ``_`` (they hold YAML anchors) and the
    keys of B-DPO, which are checked elsewhere.

    Args:
        config: the configuration as its YAML file has it, before Axolotl validates it.
    """
    found = _dropped(config, known_keys(config.get("rl")), ())
    return [
        each
        for each in found
        if len(each.path) > 1 or not str(each.path[0]).startswith((PREFIX, "_"))
    ]


def without_effect(config: Mapping[str, Any]) -> list[Dropped]:
    """Returns the keys of a configuration that have no effect on a run, as Axolotl drops them.

    In a B-DPO run the entries of `datasets` are skipped: entries.py restores or refuses the keys
    that Axolotl drops from them.

    Args:
        config: the configuration as its YAML file has it, before Axolotl validates it.
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
    """Returns the keys of a pydantic schema, including aliases."""
    if schema.model_config.get("extra") == "allow":
        return None
    known: dict[str, Keys] = {}
    for name, field in schema.model_fields.items():
        keys = _of_type(field.annotation)
        names = {name, field.alias}
        if isinstance(field.validation_alias, AliasChoices):
            names |= {alias for alias in field.validation_alias.choices if isinstance(alias, str)}
        known |= dict.fromkeys((name for name in names if name), keys)
    return known


def _of_type(annotation: Any) -> Keys:
    """Returns the keys that a value of a type may have. For a union, those of all its members."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return of_schema(annotation)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _of_type(inner[0])
    if origin in (Union, types.UnionType, list, tuple, Sequence):
        kinds = [_of_type(each) for each in inner]
        known = [keys for keys in kinds if keys is not None]
        if known and not any(map(_is_free, inner)):
            return {name: keys for mapping in known for name, keys in mapping.items()}
    return None


def _is_free(annotation: Any) -> bool:
    """Whether a type is a mapping with arbitrary keys."""
    return annotation is Any or annotation is dict or get_origin(annotation) is dict


def _dropped(value: Any, keys: Keys, path: tuple[str | int, ...]) -> Iterator[Dropped]:
    if keys is None:
        return
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _dropped(entry, keys, (*path, number))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key in keys:
                yield from _dropped(inner, keys[key], (*path, key))
            elif inner is not None:
                yield Dropped((*path, str(key)), inner, tuple(keys))
