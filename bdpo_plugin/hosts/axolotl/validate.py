"""A configuration as Axolotl's own validation finds it, on whatever machine: no model, no data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas import datasets
from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import BaseModel, ValidationError
from transformers.utils import is_flash_attn_2_available

from bdpo_plugin.hosts.axolotl.args import BDPOArgs
from bdpo_plugin.hosts.axolotl.side_effects import KEYS, PLUGINS
from bdpo_plugin.settings import unknown_key_message

#: A GPU that has what a configuration may ask for, whatever this machine has.
_GPU = {"bf16": True, "fp8": False, "tf32": True, "compute_capability": "sm_90"}
#: Modules that may be imported to check a stranger's file.
_PLUGINS = ("bdpo_plugin.", "axolotl.integrations.")


def problems(config: dict[str, Any], processes: int) -> Iterator[str]:
    """What Axolotl would refuse of a configuration, or drop without a word.

    Args:
        config: as its YAML says.
        processes: how many GPUs it is for.
    """
    fields = {**AxolotlInputConfig.model_fields, **BDPOArgs.model_fields}
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    raw = copy.deepcopy(config)
    plugins = [str(name) for name in raw.get("plugins") or []]
    raw["plugins"] = [name for name in plugins if name.startswith(_PLUGINS)]
    known |= KEYS
    if raw["plugins"] == plugins:  # others may have keys of their own
        for key in sorted(set(map(str, config)) - known):
            yield unknown_key_message(key, known)
    known = {name for schema in _schemas() for name in schema.model_fields}
    for place in ("datasets", "test_datasets"):
        for entry in config.get(place) or []:
            for key in sorted(set(map(str, entry)) - known):
                yield f"`{place}`: {unknown_key_message(key, known)}"
    if str(raw.get("attn_implementation")).startswith("flash") and not is_flash_attn_2_available():
        raw["attn_implementation"] = "sdpa"
    # some of Axolotl's own clone a repository or start a server when they are registered
    raw["plugins"] = [name for name in raw["plugins"] if not name.startswith(PLUGINS)]
    cfg = DictDefault(raw)
    try:
        prepare_plugins(cfg)
        validate_config(
            cfg,
            capabilities=_GPU | {"n_gpu": processes},
            env_capabilities={"torch_version": torch.__version__.partition("+")[0]},
        )
    except ValidationError as error:
        for each in error.errors():
            place = ".".join(str(part) for part in each["loc"])
            yield f"`{place}`: {each['msg']}" if place else each["msg"]
    except (ImportError, ValueError) as error:
        yield str(error)


def _schemas() -> Iterator[type[BaseModel]]:
    """Whatever an entry of `datasets` may be: Axolotl takes an entry for preferences apart."""
    for value in vars(datasets).values():
        if isinstance(value, type) and issubclass(value, BaseModel):
            yield value
