"""Reads the YAML file of a host, and checks that its model can be loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click


class Config(NamedTuple):
    """The contents of a YAML file: its host (a key of :data:`HOSTS`) and its keys."""

    host: str
    keys: dict[str, Any]


class Host(NamedTuple):
    """A host: its name, its command, and its keys of the model, the revision of the model, and the
    pairs that a process has in a batch."""

    name: str
    tool: str
    model: str
    revision: str
    batch: str

    @property
    def command(self) -> str:
        """The command that trains with a configuration."""
        return f"{self.tool} train"


_BATCH = "per_device_train_batch_size"
HOSTS = {
    "axolotl": Host("Axolotl", "axolotl", "base_model", "revision_of_model", "micro_batch_size"),
    "llamafactory": Host(
        "LLaMA-Factory", "llamafactory-cli", "model_name_or_path", "model_revision", _BATCH
    ),
    "trl": Host("TRL", "bdpo", "model_name_or_path", "model_revision", _BATCH),
}
#: The keys that name a model, and the same for messages.
MODEL_KEYS = {host.model for host in HOSTS.values()}
MODEL_KEYS_SHOWN = "`base_model` (Axolotl) nor `model_name_or_path` (LLaMA-Factory, TRL)"
#: Keys that name TRL's data, and that LLaMA-Factory does not have.
_DATA_OF_TRL = {"dataset_name", "datasets"}


def hosts_of(keys: Mapping[str, Any]) -> list[str]:
    """Returns the hosts whose key of the model a configuration has: more than one is a mistake."""
    of_trl = bool(_DATA_OF_TRL & keys.keys())
    other = "llamafactory" if of_trl else "trl"
    return [name for name, host in HOSTS.items() if host.model in keys and name != other]


def read_config(path: Path) -> Config:
    """Reads a configuration and recognises its host, which need not be installed.

    Raises:
        click.ClickException: the file is not YAML, or not a configuration of exactly one host.
    """
    import yaml

    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.ClickException(f"{path} is no YAML: {error}") from error
    hosts = hosts_of(keys) if isinstance(keys, dict) else []
    if len(hosts) != 1:
        raise click.ClickException(
            f"{path} is no configuration of Axolotl, LLaMA-Factory or TRL: it has neither "
            f"{MODEL_KEYS_SHOWN}. Begin with a complete one: "
            "`bdpo recipes copy axolotl/qwen2-7b-qlora`"
            if not hosts
            else f"{path} has keys of two hosts: {', '.join(sorted(MODEL_KEYS))}. "
            "Remove those of one of them"
        )
    return Config(hosts[0], keys)


def check_preference(path: Path, config: Config) -> None:
    """Raises click.ClickException if a configuration does not train on preference pairs."""
    if config.host == "trl":
        return  # `bdpo train` knows nothing else
    wanted = {"axolotl": ("rl", ("bdpo", "dpo")), "llamafactory": ("stage", ("dpo",))}
    key, values = wanted[config.host]
    if config.keys.get(key) not in values:
        has = f"`{key}: {config.keys[key]}`" if key in config.keys else f"no `{key}`"
        raise click.ClickException(
            f"{path} has {has}: the mutual information is that of "
            f"preference pairs. Write `{key}: {values[0]}`"
        )


def check_installed(host: str) -> None:
    """Raises click.ClickException if a host is not installed."""
    if find_spec(host) is None:
        raise click.ClickException(
            f"this is a configuration of {HOSTS[host].name}, which is not installed in this "
            "environment: call `bdpo` in the one where you train"
        )


#: Environment variables that make LLaMA-Factory use another hub than Hugging Face's.
_OTHER_HUBS = {"USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB"}


def check_model(host: str, keys: Mapping[str, Any]) -> None:
    """Raises click.ClickException if the model of a host's configuration cannot be loaded."""
    if host == "llamafactory" and _OTHER_HUBS & os.environ.keys():
        return  # the model may be on another hub
    key = HOSTS[host].model
    if host == "axolotl" and keys.get("base_model_config"):
        key = "base_model_config"  # `base_model` may then have nothing but weights
    check_model_name(str(keys[key]), f"`{key}: {keys[key]}`", keys.get(HOSTS[host].revision))


def check_model_name(name: str, said: str, revision: str | None = None) -> None:
    """Raises click.ClickException if a model cannot be loaded. Reads its configuration only.

    Args:
        name: a name on the hub, or a folder.
        said: the key or option with which the user named it, for the message.
        revision: the revision of the hub's repository.
    """
    from transformers import PretrainedConfig

    try:
        if not PretrainedConfig.get_config_dict(name, revision=revision)[0]:
            raise OSError("no config.json")
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            reason = "it is a folder without a readable config.json"
        elif Path(name).exists():
            reason = "it is a file; a model is a folder, or a name on the Hugging Face hub"
        else:
            reason = (
                "there is no such folder here, and the Hugging Face hub does not give a model of "
                "that name (it may be misspelt, private, or the network may be off)"
            )
        raise click.ClickException(f"{said} is no model that can be loaded: {reason}") from error
