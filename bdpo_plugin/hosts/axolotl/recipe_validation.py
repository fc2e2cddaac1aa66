"""Validates a recipe with Axolotl's own schema, on any machine, without its model and data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from pydantic import ValidationError
from transformers.utils import is_flash_attn_2_available

from bdpo_plugin.hosts.axolotl.schema import dropped_words
from bdpo_plugin.hosts.axolotl.side_effects import KEYS, PLUGINS

#: Capabilities of a GPU that supports whatever a configuration asks for, for Axolotl's validation.
_GPU = {"bf16": True, "fp8": False, "tf32": True, "compute_capability": "sm_90"}
#: Prefixes of the modules that may be imported to validate an untrusted file.
_PLUGINS = ("bdpo_plugin.", "axolotl.integrations.")


def problems(config: dict[str, Any], processes: int) -> Iterator[str]:
    """Yields what Axolotl would refuse in a configuration, or silently drop.

    Args:
        config: the configuration, as its YAML file has it.
        processes: the number of GPUs that it is meant for.
    """
    raw = copy.deepcopy(config)
    plugins = [str(name) for name in raw.get("plugins") or []]
    raw["plugins"] = [name for name in plugins if name.startswith(_PLUGINS)]
    known_plugins = raw["plugins"] == plugins  # other plugins may declare keys of their own
    if str(raw.get("attn_implementation")).startswith("flash") and not is_flash_attn_2_available():
        raw["attn_implementation"] = "sdpa"
    # some of Axolotl's own plugins clone a repository or start a server when they are registered
    raw["plugins"] = [name for name in raw["plugins"] if not name.startswith(PLUGINS)]
    cfg = DictDefault(raw)
    try:
        prepare_plugins(cfg)
        if known_plugins:
            # without the keys of plugins that are not registered here
            others = {key: value for key, value in config.items() if key not in KEYS}
            yield from dropped_words(others)
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
