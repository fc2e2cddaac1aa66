"""Checks the configuration of a B-DPO run's model before any data is loaded."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bdpo_plugin.hosts.axolotl.rewrite_config import MARK
from bdpo_plugin.hosts.wrapping import Arguments, Call, wrap
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.training.model_files import check_decoder, check_model


def wrap_model_config(module: ModuleType) -> None:
    """Wraps `axolotl.utils.config.load_model_config`."""
    wrap(module, "load_model_config", _load_model_config)


def _load_model_config(call: Call, given: Arguments) -> Any:
    cfg = given["cfg"]
    if not cfg.get(MARK):
        return call()
    try:
        config = call()
    except (OSError, ValueError) as error:
        key = "base_model_config" if cfg.base_model_config != cfg.base_model else "base_model"
        check_model(key, str(cfg[key]), revision=cfg.revision_of_model)
        told = " ".join(str(error).split())[:300]
        raise BDPOError(f"`{key}: {cfg[key]}` cannot be loaded: {told}") from error
    if getattr(config, "model_type", None) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        check_decoder(config, f"`base_model: {cfg.base_model}`")
    return config
