"""B-DPO's loss in LLaMA-Factory's DPO trainer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import IterableDataset
from llamafactory.extras.ploting import plot_loss
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from torch import Tensor

from bdpo_plugin.hosts.llamafactory.data import (
    BEFORE,
    TOKENISED,
    batch_as_trl,
    check_collator,
    dataset_pairs,
    stream_pair,
)
from bdpo_plugin.hosts.llamafactory.describe import describe_reference, free_weights
from bdpo_plugin.pairs import Pair
from bdpo_plugin.reference.reference import Reference
from bdpo_plugin.run.columns import (
    LENGTH,
    ReadyDatasets,
    ScoreCollator,
    batch_scores,
    drop_reserved,
    with_columns,
)
from bdpo_plugin.run.mixin import RunMixin
from bdpo_plugin.run.reference_source import release_reference, resolve_reference
from bdpo_plugin.run.report import add_peak_memory, print_problems, score_file
from bdpo_plugin.run.scorer import Balancer, longest
from bdpo_plugin.run.step import TOTAL, LossTerms, preference_step
from bdpo_plugin.run.stream import StreamFilter, TellStreams
from bdpo_plugin.settings import BDPOSettings
from bdpo_plugin.trainer.data import batch_pairs, model_inputs, peek, stream_refusal

#: The curves that `plot_loss: true` draws beside LLaMA-Factory's own.
_CURVES = ("rewards/margins", "bdpo/imbalance", "bdpo/weight_chosen", "bdpo/scale")


class LlamaFactoryBDPOTrainer(RunMixin, CustomDPOTrainer):
    """LLaMA-Factory's DPO trainer with B-DPO's reference pass, weights, loss and metrics.

    Its optimizers, schedulers, samplers, logging and callbacks stay. `pref_ftx` adds its SFT term
    as it does to any other loss.

    Args:
        model, ref_model, finetuning_args, processor, **kwargs: of `CustomDPOTrainer`.

    Raises:
        BDPOError: data that cannot be trained on, or a run that cannot be honoured.
    """

    def __init__(
        self, model: Any, ref_model: Any, finetuning_args: Any, processor: Any = None, **kwargs: Any
    ) -> None:
        check_collator(kwargs["data_collator"])
        self.bdpo = BDPOSettings.from_keys(vars(finetuning_args))
        callbacks = kwargs.get("callbacks") or []
        model_args = next((c.model_args for c in callbacks if hasattr(c, "model_args")), None)
        with warnings.catch_warnings():  # LLaMA-Factory switches all of them off
            super().__init__(model, ref_model, finetuning_args, processor, **kwargs)
        self._described = describe_reference(self, ref_model, model_args)
        types, weights = ["sigmoid"], [1.0]
        if self.ftx_gamma > 1e-6:  # as LLaMA-Factory has it
            types, weights = [*types, "sft_by_pair"], [*weights, self.ftx_gamma]
        self._terms = LossTerms(types, weights, self.beta)
        self.balancer = Balancer(
            self.bdpo, self.processing_class, self.accelerator, self.args.output_dir
        )
        self._ready = ReadyDatasets()
        self._streams: list[StreamFilter] = []
        if self.args.length_column_name == "length":  # the host's default, which data may have too
            self.args.length_column_name = LENGTH
        self._prepare_datasets()
        if self.bdpo.precompute:
            release_reference(self)
            if ref_model is not None and ref_model is not model:
                free_weights(ref_model)
        self.data_collator = ScoreCollator(self.data_collator)
        self.add_callback(TellStreams(self.accelerator, self._streams))

    # The datasets -------------------------------------------------------------------------------

    def _prepare_datasets(self) -> None:
        if self.train_dataset is not None:
            self.train_dataset = self._prepared(self.train_dataset, "train", score_file(""))
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._prepared(dataset, name, score_file(name))
                for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._prepared(self.eval_dataset, "eval", score_file("eval"))

    def _prepared(self, dataset: Any, name: str, file: str) -> Any:
        """The usable rows of a dataset, with their scores where they are computed in advance."""
        of_training = dataset is self.train_dataset
        dataset, problems = drop_reserved(dataset, name)
        if self.is_world_process_zero():
            print_problems(problems)
        if isinstance(dataset, IterableDataset):
            if self.bdpo.precompute:
                raise stream_refusal(name)
            return self._prepare_stream(dataset, name)
        pairs = dataset_pairs(dataset, name)
        rows = self.balancer.usable_rows(pairs, name, [BEFORE] * len(pairs))
        if len(rows) < len(pairs):
            dataset, pairs = dataset.select(rows), [pairs[row] for row in rows]
        self._settle(pairs)
        if of_training:
            self.balancer.take_training_pairs(pairs)
        columns = {LENGTH: longest(pairs)}
        if self.bdpo.precompute:
            columns = self.balancer.score_dataset(pairs, rows, name, self._reference(), file)
        return self._ready.add(with_columns(dataset, columns))

    def _prepare_stream(self, stream: IterableDataset, name: str) -> IterableDataset:
        """The stream without the pairs that cannot teach, which are counted."""
        rows = StreamFilter(
            name,
            partial(stream_pair, name=name),
            bos=self.processing_class.bos_token_id,
            is_blank=self.balancer.is_blank,
            workers=self.args.dataloader_num_workers,
        )
        stream = stream.filter(rows.teaches)
        self._settle(dataset_pairs(peek(stream, name, TOKENISED), name))
        rows.start_counting()
        self._streams.append(rows)
        return stream

    def _prepared_later(self, dataset: Any, name: str) -> Any:
        return self._prepared(dataset, name, "")

    def _settle(self, pairs: list[Pair]) -> None:
        if self.balancer.null_prompt is None:
            wrapped = None if self.bdpo.precompute else self.model
            self.balancer.find_null_prompt(pairs, self._reference(wrapped))

    def _reference(self, wrapped: Any = None) -> Reference:
        return replace(resolve_reference(self, wrapped), description=self._described)

    # The step -----------------------------------------------------------------------------------

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        batch = batch_as_trl(batch)
        if self.bdpo.precompute:
            scores = batch_scores(batch)
        else:
            scores = self.balancer.score_batch(batch_pairs(batch), self._reference(model))
        loss, metrics, _ = preference_step(
            self.balancer.reader,
            model,
            model_inputs(batch),
            batch["completion_mask"],
            scores,
            self._terms,
        )
        del metrics[TOTAL]
        prefix = "eval_" if train_eval == "eval" else ""
        # left on the device until they are logged
        return loss, {f"{prefix}{k}": total / count for k, (total, count) in metrics.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        add_peak_memory(logs, self.args.device)
        super().log(logs, *args, **kwargs)

    def save_state(self) -> None:
        super().save_state()
        if self.finetuning_args.plot_loss and self.is_world_process_zero():
            plot_loss(self.args.output_dir, keys=list(_CURVES))
