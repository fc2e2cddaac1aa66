"""The trainer for LLaMA-Factory: its DPO trainer with B-DPO's loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from datasets import Dataset, IterableDataset
from llamafactory.extras.ploting import plot_loss
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from torch import Tensor
from trl.models import prepare_deepspeed

from bdpo_plugin.data.pairs import Pair, is_blank
from bdpo_plugin.hosts.llamafactory.reference import describe_reference, free_weights
from bdpo_plugin.hosts.llamafactory.tokenised import (
    BEFORE,
    TOKENISED,
    check_collator,
    dataset_pairs,
    preference_batch,
    stream_pair,
    written_dates,
)
from bdpo_plugin.output.run_record import add_peak_memory
from bdpo_plugin.reference.reference_source import ReferenceSource
from bdpo_plugin.settings import BDPOSettings
from bdpo_plugin.training.datasets import Tokenised, drop_reserved
from bdpo_plugin.training.score_columns import ScoreCollator
from bdpo_plugin.training.step import TOTAL, LossTerms
from bdpo_plugin.training.streaming_data import ReportStreams, StreamFilter
from bdpo_plugin.training.trainer_mixin import RunMixin

#: Log keys that `plot_loss: true` plots in addition to LLaMA-Factory's own.
_CURVES = ("rewards/margins", "bdpo/imbalance", "bdpo/weight_chosen", "bdpo/scale")


class LlamaFactoryBDPOTrainer(RunMixin, CustomDPOTrainer):
    """LLaMA-Factory's DPO trainer with B-DPO's reference pass, weights, loss and metrics.

    LLaMA-Factory's optimizers, schedulers, samplers, logging and callbacks are unchanged.
    `pref_ftx` adds its SFT term as it does to any other loss.

    Args:
        model, ref_model, finetuning_args, processor, **kwargs: as in `CustomDPOTrainer`.

    Raises:
        BDPOError: the data cannot be trained on, or a setting cannot be honoured.
    """

    host = "llamafactory"
    tokenised_columns = TOKENISED

    def __init__(
        self, model: Any, ref_model: Any, finetuning_args: Any, processor: Any = None, **kwargs: Any
    ) -> None:
        check_collator(kwargs["data_collator"])
        self._begin(BDPOSettings.from_keys(vars(finetuning_args)), kwargs["args"])
        self.host_dates = written_dates(kwargs["data_collator"].template)
        callbacks = kwargs.get("callbacks") or []
        model_args = next((c.model_args for c in callbacks if hasattr(c, "model_args")), None)
        with warnings.catch_warnings():  # LLaMA-Factory turns all warnings off
            super().__init__(model, ref_model, finetuning_args, processor, **kwargs)
        self._tokenizer = self.processing_class
        self._described = describe_reference(self, ref_model, model_args)
        types, weights = ["sigmoid"], [1.0]
        if self.ftx_gamma > 1e-6:  # the same threshold as LLaMA-Factory's
            types, weights = [*types, "sft_by_pair"], [*weights, self.ftx_gamma]
        self._terms = LossTerms(types, weights, self.beta)
        self._prepare_datasets()
        if self.settings.precompute:
            self._source.release()
            if ref_model is not None and ref_model is not model:
                free_weights(ref_model)
        self.data_collator = ScoreCollator(self.data_collator)
        self.add_callback(ReportStreams(self.accelerator, self._stream_filters))

    @cached_property
    def _source(self) -> ReferenceSource:
        return ReferenceSource(self, prepare_deepspeed, self._described)

    # The datasets -------------------------------------------------------------------------------

    def _prepared(self, given: Sequence[tuple[str, Any]], **when: bool) -> list[Any]:
        main = self.is_world_process_zero()
        given = [(name, drop_reserved(dataset, name, main=main)) for name, dataset in given]
        return super()._prepared(given, **when)

    def _pairs(self, dataset: Dataset, name: str) -> list[Pair]:
        return dataset_pairs(dataset, name)

    def _tokenised(self, dataset: Dataset, name: str) -> Tokenised:
        pairs = dataset_pairs(dataset, name)
        return Tokenised(
            pairs, [BEFORE] * len(pairs), prompt_boundary_mismatch=(), rows=range(len(pairs))
        )

    def _filtered(self, stream: IterableDataset, name: str) -> IterableDataset:
        rows = StreamFilter(
            name,
            partial(stream_pair, name=name),
            bos=self._tokenizer.bos_token_id,
            is_blank=partial(is_blank, self._tokenizer),
            workers=self.args.dataloader_num_workers,
        )
        self._stream_filters.append(rows)
        return stream.filter(rows.is_trainable)

    # The step -----------------------------------------------------------------------------------

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics, _ = self._step(model, batch, preference_batch(batch))
        del metrics[TOTAL]
        prefix = "eval_" if train_eval == "eval" else ""
        # The metrics stay on the device until they are logged.
        return loss, {f"{prefix}{k}": total / count for k, (total, count) in metrics.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        add_peak_memory(logs, self.args.device)
        super().log(logs, *args, **kwargs)

    def save_state(self) -> None:
        super().save_state()
        if self.finetuning_args.plot_loss and self.is_world_process_zero():
            plot_loss(self.args.output_dir, keys=list(_CURVES))
