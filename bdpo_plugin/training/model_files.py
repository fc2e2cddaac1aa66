"""Whether a model can be had and trained, looked at before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from bdpo_plugin.settings import BDPOError

#: Of a folder with an adapter alone, which names its base model.
_ADAPTER = "adapter_config.json"


def check_model(key: str, name: str, **hub: Any) -> None:
    """Refuse a model that is not there, or that B-DPO cannot train.

    Args:
        key: of the host's configuration, which names the model.
        name: a folder, or a name of the hub.
        hub: `revision`, `token` and `cache_dir` for the latter.

    Raises:
        BDPOError: there is none of that name, or it has an encoder.
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
    """Refuse a model with an encoder, such as T5.

    Args:
        config: of the model, or its dictionary.
        named: the model, for the message.
    """
    values: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    if values.get("is_encoder_decoder"):
        raise BDPOError(
            f"{named} is an encoder-decoder model (`model_type: {values.get('model_type')}`), "
            "which B-DPO cannot train: it reads a response as the continuation of its prompt by a "
            "causal language model. Choose a decoder-only model."
        )
