"""Reads a configuration of `bdpo train` (the keys of `trl dpo` and B-DPO's) by TRL's parser."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from bdpo_plugin.hosts.trl.config import BDPOConfig
from bdpo_plugin.limits import check_complete
from bdpo_plugin.settings import RECIPE, BDPOError, unknown_key_message

_GROUPS = (ScriptArguments, BDPOConfig, ModelConfig, DatasetMixtureConfig)
#: Keys of `trl dpo` for the command that it starts, `accelerate launch`.
_LAUNCH = ("accelerate_config", "num_processes")
#: Every key, from TRL's dataclasses.
KNOWN = frozenset(field.name for group in _GROUPS for field in fields(group) if field.init)


class Arguments(NamedTuple):
    """A configuration as TRL's dataclasses.

    Attributes:
        script: which dataset to load, if it is one.
        training: the training arguments.
        model: the model, its quantisation and its adapter.
        mixture: which datasets to load, if they are several or files.
        keys: the configuration as a mapping, with the options of the command line.
    """

    script: ScriptArguments
    training: BDPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    keys: dict[str, Any]


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """Raises in place of a usage message with some 300 options."""
        raise BDPOError(f"{message.removeprefix('argument ')}.")


def parse(keys: Mapping[str, Any], options: Sequence[str] = ()) -> Arguments:
    """Parses a configuration.

    Args:
        keys: the contents of the YAML file.
        options: options of the command line, which override it (``--beta 0.2``).

    Raises:
        BDPOError: a key is unknown, or a value is refused by TRL or B-DPO.
    """
    kept = {str(key): value for key, value in keys.items() if key not in (RECIPE, "env")}
    check_complete(kept)
    for key in kept:
        if key not in KNOWN:
            raise BDPOError(_unknown(key))
    for name, value in (keys.get("env") or {}).items():
        os.environ[str(name)] = str(value)
    parser = _Parser(_GROUPS, allow_abbrev=False)
    parser.set_defaults_with_config(**copy.deepcopy(kept))  # TRL changes `datasets` in place
    try:
        *groups, rest = parser.parse_args_into_dataclasses(
            list(options), return_remaining_strings=True
        )
    except (TypeError, ValueError) as error:  # of the dataclasses, which check what they hold
        raise BDPOError(str(error)) from error
    if rest:
        raise BDPOError(_unknown(rest[0].partition("=")[0].removeprefix("--").replace("-", "_")))
    given = {name: _value(groups, name) for name in _named(options)}
    script, training, model, mixture = groups
    return Arguments(script, training, model, mixture, {**kept, **given})


def _unknown(key: str) -> str:
    if key in _LAUNCH:
        return (
            f"`{key}` is not read here: `bdpo train` is one process. For several, call "
            '`accelerate launch --num_processes N "$(command -v bdpo)" train FILE`.'
        )
    return unknown_key_message(key, KNOWN)


def _named(options: Iterable[str]) -> list[str]:
    """Returns the keys that options of the command line set."""
    words = [o.partition("=")[0][2:].replace("-", "_") for o in options if o.startswith("--")]
    return [word if word in KNOWN else word.removeprefix("no_") for word in words]


def _value(groups: Iterable[Any], name: str) -> Any:
    (value,) = (getattr(group, name) for group in groups if hasattr(group, name))
    return getattr(value, "value", value)  # transformers has enums for some
