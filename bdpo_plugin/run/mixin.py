"""What B-DPO changes of a host's trainer around the steps, whoever the host is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import get_last_checkpoint

from bdpo_plugin.run.columns import ReadyDatasets, unscored
from bdpo_plugin.run.continuing import check_checkpoint, write_description
from bdpo_plugin.settings import BDPOError


class RunMixin:
    """Data that this trainer has prepared itself, and checkpoints that can be continued exactly.

    The trainer it is mixed into has ``bdpo``, its settings, ``balancer`` and ``_terms``, and keeps
    in ``_ready`` the datasets that it has prepared.
    """

    _ready: ReadyDatasets

    def _prepared_later(self, dataset: Dataset, name: str) -> Dataset:
        """A dataset that was given after the trainer was made, its rows checked."""
        raise NotImplementedError

    def _checked(self, dataset: Any, name: str) -> Any:
        if dataset is None or dataset in self._ready:
            return dataset
        if self.bdpo.precompute:
            raise unscored(f"The {name} data")
        return self._prepared_later(dataset, name) if isinstance(dataset, Dataset) else dataset

    def get_train_dataloader(self) -> DataLoader:
        self.train_dataset = self._checked(self.train_dataset, "training")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            self._checked(self.eval_dataset[eval_dataset], eval_dataset)
        elif eval_dataset is not None:
            eval_dataset = self._checked(eval_dataset, "evaluation")
        else:
            self._checked(self.eval_dataset, "evaluation")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self._checked(test_dataset, "test"))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise BDPOError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
        if resume_from_checkpoint:
            plain = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            check_checkpoint(resume_from_checkpoint, self._description(), optimizer=plain)
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        loaded = self.model if model is None else model
        dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # With folders of other adapters in it, such as that of a frozen reference, transformers
        # leaves out the adapter that is trained.
        if any(Path(resume_from_checkpoint).glob("*/adapter_model.*")):
            adapter = loaded.active_adapters[0]
            loaded.load_adapter(resume_from_checkpoint, adapter, is_trainable=True)
        # PEFT reads an adapter in bfloat16, as TRL keeps that of QLoRA, into one in float32
        for name, parameter in loaded.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # before the weights: a run that is killed between them leaves a checkpoint that says less
        write_description(output_dir or self.args.output_dir, self._description())
        super()._save(output_dir, state_dict)

    def _description(self) -> dict[str, Any]:
        """What the run's losses depend on beside the host's own settings."""
        return {**self.balancer.description(), "loss": asdict(self._terms)}
