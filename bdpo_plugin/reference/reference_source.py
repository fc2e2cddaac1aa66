"""Decides which model is the reference of a run, before training and during a step, and releases it
after the reference pass. The trainers of all hosts use it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from accelerate.utils import is_peft_model

from bdpo_plugin.model.traits import is_sharded
from bdpo_plugin.reference.fingerprint import AS_IT_IS
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.settings import BDPOError


class ReferenceSource:
    """The reference of a trainer, chosen by the same rules as in TRL.

    Create it before the model is sharded, because afterwards a rank may hold none of an adapter's
    weights. If TRL has copied the adapter that the model came with, the constructor completes the
    copy, which lacks some kinds of weights.

    Args:
        trainer: a `trl.DPOTrainer` or a similar trainer, whose `model` and `ref_model` are set.
        prepare_deepspeed: TRL's function of that name.
        description: a description of the reference for the user; default: derived from the trainer.

    Attributes:
        released: whether the reference has been released, so that it cannot run any more.
    """

    def __init__(
        self,
        trainer: Any,
        prepare_deepspeed: Callable[[Any, Any], Any],
        description: str | None = None,
    ) -> None:
        self._trainer = trainer
        self._prepare_deepspeed = prepare_deepspeed
        self._description = description
        self.released = False
        # TRL's name for its copy of the adapter given; None: the adapter is off in the reference
        self._adapter: str | None = None
        self._trained_base: list[str] = []
        if trainer.ref_model is None and is_peft_model(trainer.model):
            peft = trainer.accelerator.unwrap_model(trainer.model)
            if "ref" in peft.peft_config and not _is_fresh(peft, "ref"):
                self._adapter = "ref"
                _copy_whole_adapter(peft)
            _check_initialisation(peft)
            self._trained_base = _trained_base(peft)

    def before_training(self) -> Reference:
        """Returns the reference for use outside of training steps.

        Raises:
            BDPOError: The model cannot run at this point, or training has changed the weights of
                the reference.
        """
        if self._trainer.state.global_step > 0:
            self._check_base()
        return self._reference(self._placed)

    def during_step(self, model: Any) -> Reference:
        """Returns the reference for use during a training step.

        Raises:
            BDPOError: Training changes weights outside of the adapter, so the model with its
                adapter off is not the reference.
        """
        self._check_base()
        return self._reference(lambda: model)

    def _check_base(self) -> None:
        if not self._trained_base:
            return
        peft = self._trainer.accelerator.unwrap_model(self._trainer.model)
        configs = peft.peft_config.values()
        biases = {getattr(config, "bias", "none") for config in configs} - {"none"}
        what = " and ".join(f"`bias: {bias}`" for bias in sorted(biases))
        what = what or f"training {', '.join(self._trained_base[:3])}"
        raise BDPOError(
            f"{what} changes weights of the base model itself, which stay changed when the adapter "
            "is off: the reference of a step would no longer be the model before training. Set "
            "`bdpo_precompute: true` and give all datasets to the trainer when it is made, or "
            "train the adapter alone (`bias: none`)."
        )

    def release(self) -> None:
        """Releases the separate reference model, or TRL's copy of the adapter that the model came
        with. After the reference pass only the scores are needed.

        If the copy were kept, a checkpoint would contain a folder for it, and a resumed run would
        load that folder instead of the trained adapter.
        """
        trainer = self._trainer
        if trainer.ref_model is not None:
            prepared = trainer.accelerator._models
            prepared[:] = [model for model in prepared if model is not trainer.ref_model]
            trainer.ref_model = None
            self.released = True
            return
        peft = trainer.accelerator.unwrap_model(trainer.model)
        if is_peft_model(peft) and "ref" in peft.peft_config:
            peft.delete_adapter("ref")
            self.released = self._adapter is not None

    def _reference(self, policy: Callable[[], Any]) -> Reference:
        trainer = self._trainer
        autocast = trainer.accelerator.autocast
        if trainer.ref_model is not None:
            model, words = trainer.ref_model, f"separate model {_name(trainer.ref_model)}"
        elif not is_peft_model(trainer.model):
            model, words = policy(), f"{_name(trainer.model)} as it is before training"
        else:
            peft = trainer.accelerator.unwrap_model(trainer.model)
            words = f"base model {_name(peft.get_base_model())}, "
            words += "with a frozen copy of the adapter given" if self._adapter else "adapter off"
            return Reference(
                policy(),
                self._description or words,
                peft=peft,
                adapter=self._adapter,
                autocast=autocast,
            )
        return Reference(model, self._description or words, adapter=AS_IT_IS, autocast=autocast)

    def _placed(self) -> Any:
        """Returns the policy in a form that can run before it is prepared for training.

        Raises:
            BDPOError: The run uses FSDP, under which there is no such form.
        """
        if self._trainer.is_fsdp_enabled:
            raise BDPOError(
                "Under FSDP the model can run only once training has begun, so its dataset cannot "
                "be scored before: set `bdpo_precompute: false`."
            )
        return self._engine if self._trainer.is_deepspeed_enabled else self._trainer.model

    @cached_property
    def _engine(self) -> Any:
        return self._prepare_deepspeed(self._trainer.model, self._trainer.accelerator)


#: Initialisations of LoRA that move a part of the base model's weights into the adapter.
_TAKEN_OUT = ("pissa", "olora", "corda", "lora_ga")


def _check_initialisation(peft: Any) -> None:
    """Refuses an adapter whose initialisation changes the weights of the base model: with the
    adapter off, the model would not be the one that training begins with.

    Raises:
        BDPOError: An adapter has such an initialisation.
    """
    for config in peft.peft_config.values():
        how = getattr(config, "init_lora_weights", None)
        if isinstance(how, str) and how.lower().startswith(_TAKEN_OUT):
            raise BDPOError(
                f"`init_lora_weights: {how}` cannot be used with B-DPO: it moves a part of the "
                "base model's weights into the adapter, so that the model with its adapter off, "
                "which is the reference, is not the model before training. Use another "
                "initialisation, or give a separate reference model (`ref_model`)."
            )


def _trained_base(peft: Any) -> list[str]:
    """Returns the names of the trained weights that belong to no adapter."""
    own = {*peft.peft_config, "adaption_prompt", "adaption_gate"}
    return [
        name
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad and own.isdisjoint(name.split("."))
    ]


def _copy_whole_adapter(peft: Any) -> None:
    """Copies the whole adapter into TRL's copy. TRL copies only the weights of modules, and not
    those of IA3, LoHa, VeRA and new tokens."""
    if is_sharded(peft):
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(peft, adapter_name="default")
    set_peft_model_state_dict(peft, state, adapter_name="ref")


def _is_fresh(peft: Any, adapter: str) -> bool:
    """Whether a LoRA adapter still has no effect, because its second matrices are zero."""
    of_adapter = [(n, p) for n, p in peft.named_parameters() if adapter in n.split(".")]
    lora = all("lora_A" in n or "lora_B" in n or "lora_embedding" in n for n, _ in of_adapter)
    second = [p for n, p in of_adapter if "lora_B" in n or "lora_embedding_B" in n]
    return lora and bool(second) and not any(bool(p.any()) for p in second)


def _name(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or f"of class {type(model).__name__}"
