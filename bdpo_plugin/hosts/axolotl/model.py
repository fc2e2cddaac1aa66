"""Checks the configuration of a B-DPO run's model before any data is loaded."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bdpo_plugin.hosts.axolotl.rewrite_config import MARK
from bdpo_plugin.hosts.wrapping import Arguments, Call, wrap
from bdpo_plugin.settings import BDPOError


def wrap_model_config(module: ModuleType) -> None:
    """Wraps `axolotl.utils.config.load_model_config`, unless it is wrapped already."""
    wrap(module, "load_model_config", _load_model_config)


def _load_model_config(call: Call, given: Arguments) -> Any:
    cfg = given["cfg"]
    if not cfg.get(MARK):
        return call()
    try:
        config = call()
    except (OSError, ValueError) as error:
        raise _not_loaded(cfg, error) from error
    kind = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False) and (
        kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        raise BDPOError(
            f"`base_model: {cfg.base_model}` is an encoder-decoder model ({kind}), which gives no "
            "probability of a response behind its prompt. Name a causal language model."
        )
    return config


def _not_loaded(cfg: Any, error: Exception) -> BDPOError:
    key = "base_model_config" if cfg.base_model_config != cfg.base_model else "base_model"
    name = str(cfg[key])
    told = " ".join(str(error).split())[:300]
    if Path(name).is_dir():
        words = "is a folder, but none with a model that transformers can read"
    else:
        words = f"is no folder in {Path.cwd()}, and could not be read from the Hugging Face hub"
    return BDPOError(f"`{key}: {name}` {words}: {told}")
