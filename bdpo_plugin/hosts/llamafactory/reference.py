"""Checks the models of a LLaMA-Factory run, and describes which frozen model its reference is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamafactory.extras.misc import use_modelscope, use_openmind
from transformers.integrations import is_deepspeed_zero3_enabled

from bdpo_plugin.settings import BDPOError
from bdpo_plugin.training.model_files import check_model


def check_models(model_args: Any, finetuning_args: Any) -> None:
    """Checks, before data is loaded, that the models exist and that B-DPO can train them.

    Args:
        model_args, finetuning_args: LLaMA-Factory's arguments.

    Raises:
        BDPOError: a model cannot be loaded or trained. The message has the key and its value.
    """
    if model_args.moe_aux_loss_coef:
        raise BDPOError(
            f"`moe_aux_loss_coef: {model_args.moe_aux_loss_coef}` has no effect in LLaMA-Factory's "
            "preference training, which adds no loss of the router (`router_aux_loss_coef: 0`). "
            "Remove it."
        )
    if use_modelscope() or use_openmind():  # LLaMA-Factory then downloads from another hub
        return
    for key, name in (
        ("model_name_or_path", model_args.model_name_or_path),
        ("ref_model", finetuning_args.ref_model),
    ):
        if name:
            check_model(
                key,
                name,
                revision=model_args.model_revision if key == "model_name_or_path" else None,
                token=model_args.hf_hub_token,
                cache_dir=model_args.cache_dir,
            )
    for adapter in model_args.adapter_name_or_path or ():
        local = Path(adapter).is_dir() or adapter.count("/") != 1  # else it may be on the hub
        if local and not Path(adapter, "adapter_config.json").is_file():
            raise BDPOError(
                f"`adapter_name_or_path: {adapter}` cannot be loaded: it is no folder with an "
                "adapter_config.json. Write the folder of an adapter."
            )


def describe_reference(trainer: Any, ref_model: Any, model_args: Any) -> str:
    """Describes the reference model of a run and where it comes from.

    Args:
        trainer: the trainer of the run.
        ref_model: the reference model that LLaMA-Factory created. None if it disables the adapter
            instead; the policy itself if it only evaluates.
        model_args: LLaMA-Factory's model arguments, or None if they are not known.
    """
    name = getattr(model_args, "model_name_or_path", None) or trainer.model.config._name_or_path
    adapters = list(getattr(model_args, "adapter_name_or_path", None) or [])
    finetuning = trainer.finetuning_args
    if finetuning.ref_model:
        own = [path.strip() for path in (finetuning.ref_model_adapters or "").split(",")]
        return f"`ref_model` {finetuning.ref_model}{_merged([path for path in own if path])}"
    if ref_model is trainer.model:
        return f"the model that is evaluated, {name}: set `ref_model` for the one it was trained on"
    if ref_model is not None:
        return f"a second copy of {name}, as it is before training"
    if not adapters or (finetuning.create_new_adapter and _merges(trainer.model, model_args)):
        return f"base model {name}{_merged(adapters)}, adapter off"
    *merged, continued = adapters
    return f"base model {name}{_merged(merged)}, adapter off (training continues from {continued})"


def _merges(model: Any, model_args: Any) -> bool:
    """Whether LLaMA-Factory merges all given adapters when it creates a new one.

    If not, it continues to train the last one."""
    quantised = getattr(model.get_base_model(), "quantization_method", None)
    kept_apart = quantised or is_deepspeed_zero3_enabled()
    return not (kept_apart or model_args.use_kt or model_args.use_unsloth)


def free_weights(model: Any) -> None:
    """Frees the weights of a model that LLaMA-Factory keeps a reference to."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def _merged(adapters: list[str]) -> str:
    return f" with {', '.join(adapters)} merged into it" if adapters else ""
