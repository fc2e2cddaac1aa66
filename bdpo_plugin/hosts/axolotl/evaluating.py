"""Makes `axolotl evaluate` of a B-DPO configuration compare a trained adapter with its base model.

Axolotl's own command loads only the base model for a DPO trainer, so that every margin would be 0.
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt
from peft import PeftConfig

from bdpo_plugin.hosts.axolotl.rewrite_config import MARK
from bdpo_plugin.hosts.wrapping import Arguments, Call, wrap
from bdpo_plugin.model.device import dtypes_kept
from bdpo_plugin.settings import BDPOError

_evaluation: ContextVar[bool] = ContextVar("an evaluation", default=False)


def wrap_evaluation() -> None:
    """Wraps the functions of `axolotl.evaluate` as soon as it is imported."""
    wrapt.register_post_import_hook(_wrap, "axolotl.evaluate")


def is_evaluation() -> bool:
    """Whether the model is loaded for evaluation, not for training."""
    return _evaluation.get()


def _wrap(module: ModuleType) -> None:
    wrap(module, "setup_model_and_tokenizer", _setup_model_and_tokenizer)
    wrap(module, "setup_trainer", _setup_trainer)


def _setup_model_and_tokenizer(call: Call, given: Arguments) -> Any:
    cfg = given["cfg"]
    if not cfg.get(MARK):
        return call()
    _check_adapter(cfg)
    token = _evaluation.set(True)
    try:
        return call()
    finally:
        _evaluation.reset(token)


def _setup_trainer(call: Call, given: Arguments) -> Any:
    if not (cfg := given["cfg"]).get(MARK):
        return call()
    # As in training, add a new adapter to the base model: the model without it is the reference.
    given["peft_config"] = PeftConfig.from_pretrained(cfg.lora_model_dir)
    trainer = call()
    model = trainer.accelerator.unwrap_model(trainer.model)
    with dtypes_kept(model):
        model.load_adapter(cfg.lora_model_dir, model.active_adapters[0], is_trainable=True)
    return trainer


def _check_adapter(cfg: Any) -> None:
    """Raises BDPOError if the policy would be the same model as the reference."""
    file = cfg.axolotl_config_path or "FILE"
    if not cfg.adapter:
        raise BDPOError(
            "`axolotl evaluate` would compare the model with itself, as Axolotl loads "
            f"`base_model: {cfg.base_model}` for both policy and reference. Without an adapter, "
            "evaluate while training: `test_datasets` (or `val_set_size`) and `eval_steps`."
        )
    folder = cfg.lora_model_dir
    if not folder:
        trained = Path(cfg.output_dir) if cfg.output_dir else Path("OUTPUT_DIR")
        raise BDPOError(
            "`axolotl evaluate` would compare the base model with itself, as no adapter is named. "
            f"Type: axolotl evaluate {file} --lora-model-dir {trained}"
        )
    if not (Path(folder) / "adapter_config.json").is_file():
        raise BDPOError(
            f"`lora_model_dir: {folder}` has no adapter (adapter_config.json). Name the folder "
            "that a training has written: its `output_dir`, or a checkpoint in it."
        )
