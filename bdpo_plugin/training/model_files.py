"""Checks before a model is loaded that it exists and that B-DPO can train it. The hosts call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from bdpo_plugin.settings import BDPOError

#: The configuration file of a folder with an adapter only; it names the base model.
_ADAPTER = "adapter_config.json"


def check_model(key: str, name: str, **hub: Any) -> None:
    """Refuses a model that does not exist, or that B-DPO cannot train.

    Args:
        hub: `revision`, `token` and `cache_dir` for a model on the hub.

    Raises:
        BDPOError: There is no model of this name, or it has an encoder.
    """
    if Path(name, _ADAPTER).is_file():
        return
    hub = {option: value for option, value in hub.items() if value is not None}
    try:
        config, _ = PretrainedConfig.get_config_dict(name, **hub)
    except (OSError, ValueError) as error:
        what = (
            "this folder has no config.json" if Path(name).is_dir() else "there is no such folder"
        )
        why = " ".join(str(error).split())[:200]
        raise BDPOError(
            f"`{key}: {name}` cannot be loaded: {what}, nor can it be had of the hub by that name "
            f"({why}). Write the folder of a model, relative to the one in which the command runs, "
            "or its full name on the hub."
        ) from error
    check_decoder(config, f"`{key}: {name}`")


def check_decoder(config: Any, named: str) -> None:
    """Refuses a model with an encoder, such as T5.

    Raises:
        BDPOError: The model has an encoder.
    """
    values: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    if values.get("is_encoder_decoder"):
        raise BDPOError(
            f"{named} is an encoder-decoder model (`model_type: {values.get('model_type')}`), "
            "which B-DPO cannot train: it reads a response as the continuation of its prompt by a "
            "causal language model. Choose a decoder-only model."
        )
