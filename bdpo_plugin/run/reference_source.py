"""Which frozen model a run's reference is, resolved as TRL resolves it."""

from __future__ import annotations

from typing import Any

from accelerate.utils import is_peft_model

from bdpo_plugin.model.traits import is_sharded
from bdpo_plugin.reference.fingerprint import AS_IT_IS
from bdpo_plugin.reference.reference import Reference
from bdpo_plugin.settings import BDPOError


def resolve_reference(trainer: Any, wrapped: Any = None) -> Reference:
    """The reference of a `trl.DPOTrainer`.

    Args:
        trainer: whose `model` and `ref_model` are set.
        wrapped: the policy as prepared for training, in a training step.

    Raises:
        BDPOError: the model cannot run at this point.
    """
    autocast = trainer.accelerator.autocast
    if trainer.ref_model is not None:
        name = _name(trainer.ref_model)
        return Reference(
            trainer.ref_model, f"separate model {name}", adapter=AS_IT_IS, autocast=autocast
        )
    if not is_peft_model(trainer.model):
        model = wrapped if wrapped is not None else _placed(trainer)
        words = f"{_name(trainer.model)} as it is before training"
        return Reference(model, words, adapter=AS_IT_IS, autocast=autocast)
    peft = trainer.accelerator.unwrap_model(trainer.model)
    # seen once, before anything is sharded: then a rank may hold none of an adapter's weights
    if not hasattr(trainer, "_bdpo_adapter"):
        given = "ref" in peft.peft_config and not _is_fresh(peft, "ref")
        trainer._bdpo_adapter = "ref" if given else None
        if given and not is_sharded(peft):
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            # TRL's copy has the weights of modules alone: not those of IA3, LoHa, VeRA, new tokens
            state = get_peft_model_state_dict(peft, adapter_name="default")
            set_peft_model_state_dict(peft, state, adapter_name="ref")
    adapter = trainer._bdpo_adapter
    model = wrapped if wrapped is not None else _placed(trainer)
    return Reference(
        model,
        f"base model {_name(peft.get_base_model())}, "
        + ("with a frozen copy of the adapter given" if adapter else "adapter off"),
        peft=peft,
        adapter=adapter,
        autocast=autocast,
    )


def release_reference(trainer: Any) -> bool:
    """Let go of what only the reference needs: after the pass its scores are all.

    That is a separate model, or the copy of the adapter that TRL makes of a model with one. Were
    the copy kept, a checkpoint would have a folder of it, and a run that resumes would load that
    in the place of the adapter that is trained.

    Returns:
        whether the reference cannot be run any more.
    """
    if trainer.ref_model is not None:
        prepared = trainer.accelerator._models
        prepared[:] = [model for model in prepared if model is not trainer.ref_model]
        trainer.ref_model = None
        return True
    peft = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft_model(peft) or "ref" not in peft.peft_config:
        return False
    peft.delete_adapter("ref")
    return trainer._bdpo_adapter is not None


def _placed(trainer: Any) -> Any:
    """The policy, where it can run before it is prepared for training."""
    if trainer.is_fsdp_enabled:
        raise BDPOError(
            "Under FSDP the model can run only once training has begun, so its dataset cannot be "
            "scored before: set `bdpo_precompute: false`."
        )
    if not trainer.is_deepspeed_enabled:
        return trainer.model
    if getattr(trainer, "_bdpo_engine", None) is None:
        from trl.models import prepare_deepspeed

        trainer._bdpo_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
    return trainer._bdpo_engine


def _is_fresh(peft: Any, adapter: str) -> bool:
    """Whether a LoRA adapter changes nothing yet, its second matrices being zero."""
    of_adapter = [(n, p) for n, p in peft.named_parameters() if adapter in n.split(".")]
    lora = all("lora_A" in n or "lora_B" in n or "lora_embedding" in n for n, _ in of_adapter)
    second = [p for n, p in of_adapter if "lora_B" in n or "lora_embedding_B" in n]
    return lora and bool(second) and not any(bool(p.any()) for p in second)


def _name(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or f"of class {type(model).__name__}"
