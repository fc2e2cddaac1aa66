"""The trainer for TRL. It overrides only what B-DPO changes in TRL's DPO trainer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from bdpo_plugin.data.pairs import Pair, first_rows, is_blank
from bdpo_plugin.data.token_ids import token_rows
from bdpo_plugin.hosts.trl.config import BDPOConfig
from bdpo_plugin.hosts.trl.limits import (
    check_arguments,
    check_columns,
    check_given_model,
    check_launch,
)
from bdpo_plugin.hosts.trl.raw_rows import (
    check_datasets,
    check_scorable,
    checked_stream,
    given_arguments,
    given_datasets,
    unreadable_rows_named,
    without_misleading_columns,
    without_rows,
)
from bdpo_plugin.hosts.trl.tokenised import (
    TOKENISED,
    dataset_pairs,
    preference_batch,
    prompt_boundary_mismatches,
)
from bdpo_plugin.output.model_card import NAME, PAPER, TAGS
from bdpo_plugin.output.run_record import add_peak_memory
from bdpo_plugin.output.tables import print_problems
from bdpo_plugin.reference.reference_source import ReferenceSource
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.training.datasets import Tokenised, drop_reserved, nothing_left
from bdpo_plugin.training.score_columns import FILE_ROW, ROW, SCORE_COLUMNS, ScoreCollator
from bdpo_plugin.training.step import TOTAL, LossTerms, MetricSums
from bdpo_plugin.training.streaming_data import ReportStreams, StreamFilter
from bdpo_plugin.training.trainer_mixin import RunMixin
from bdpo_plugin.training.weighing import Weigh


class BDPOTrainer(RunMixin, DPOTrainer):
    """Balanced Direct Preference Optimization (arXiv 2603.22829, as read in docs/method.md).

    It changes two things in `trl.DPOTrainer`. The precomputation of the reference model's
    log-probabilities also computes the mutual information of both responses with their query, and
    from it the balance weights. The loss multiplies the two log-ratios by these weights, and
    computes logits at the response positions only. Rewards stay plain DPO rewards.

    Args:
        model, ref_model: as in `trl.DPOTrainer`.
        args: a :class:`BDPOConfig`.
        *rest, **kwargs: as in `trl.DPOTrainer`.
        weigh: a callable that maps (mi_chosen, mi_rejected), each (B,), to
            :class:`~bdpo_plugin.objective.BalanceWeights`. It replaces the built-in
            :func:`~bdpo_plugin.objective.balance_weights`, and is called once for a whole dataset,
            or for each batch if ``bdpo_precompute`` is off. Its keyword-only arguments name columns
            of the data, or ``chosen_tokens`` and ``rejected_tokens``, and it is given their values.

    Raises:
        BDPOError: a setting cannot be honoured, or the data cannot be trained on.
    """

    tokenised_columns = TOKENISED
    _tag_names = ["trl", *TAGS]  # noqa: RUF012
    _name = NAME
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: BDPOConfig | None = None,
        *rest: Any,
        weigh: Weigh | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else BDPOConfig(output_dir="bdpo-output")
        self._begin(check_arguments(args), args, weigh)
        args.precompute_ref_log_probs = self.settings.precompute
        self._made = False
        check_given_model(model, args)
        check_columns([*rest, *kwargs.values()])
        given = given_arguments(rest, kwargs)
        named = given_datasets(given)
        check_scorable(named, self.settings)
        self._empty = check_datasets(named, given.get("processing_class"), args.pad_token)
        super().__init__(model, ref_model, args, *rest, **kwargs)
        reduce = partial(self.accelerator.reduce, reduction="sum")
        self._sums = {"train": MetricSums(reduce), "eval": MetricSums(reduce)}
        self._terms = LossTerms(self.loss_types, self.loss_weights, self.beta, self.label_smoothing)
        if self.settings.precompute:
            self._source.release()
        else:
            self._prepare_datasets()
        self.data_collator = ScoreCollator(self.data_collator)
        self.add_callback(ReportStreams(self.accelerator, self._stream_filters))
        self._made = True

    @cached_property
    def _source(self) -> ReferenceSource:
        # TRL asks for scores from within its constructor, and has a model only by then
        check_launch(self.accelerator, self.args.n_gpu)
        return ReferenceSource(self, prepare_deepspeed)

    # The datasets -------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        if dataset in self._ready:
            return dataset
        if self._made:
            self._empty = check_datasets([(name, dataset)], self._tokenizer, args.pad_token)
        empty = self._empty.get(id(dataset), ())
        dataset = drop_reserved(
            without_misleading_columns(dataset), name, main=args.process_index == 0
        )
        if isinstance(dataset, IterableDataset):
            return self._tokenised_stream(dataset, processing_class, args, name)
        dataset = dataset.add_column(ROW, list(range(len(dataset))))
        dataset, problems = without_rows(dataset, empty, name)
        if args.process_index == 0:
            print_problems(problems)
        with unreadable_rows_named(dataset, name, self._tokenizer):
            prepared = super()._prepare_dataset(dataset, processing_class, args, name)
        if lost := len(dataset) - len(prepared):
            # these are positions in `dataset`; ROW holds positions before `without_rows`
            left = set(prepared[ROW])
            rows = [place for place, row in enumerate(dataset[ROW]) if row not in left]
            shown = first_rows(rows, dataset[FILE_ROW if FILE_ROW in dataset.features else ROW])
            problem = (
                f"{lost} of {len(dataset)} pairs of the {name} data: the prompt alone fills the "
                f"sequence length of {args.max_length} tokens (dropped; rows {shown})"
            )
            if not len(prepared):
                raise BDPOError(f"{problem}. Nothing is left to train on: raise that length.")
            if args.process_index == 0:
                print_problems([problem])
        return prepared

    def _tokenised_stream(self, stream: Any, processing_class: Any, args: Any, name: str) -> Any:
        """Tokenises a stream. Filters out, and counts, the pairs that cannot be trained on."""

        def pair(row: Any) -> tuple[Pair, tuple[int, int]]:
            collator = getattr(self.data_collator, "collator", self.data_collator)
            (found,) = preference_batch(collator([{c: row[c] for c in TOKENISED}])).pairs()
            return found, (len(row["chosen_ids"]), len(row["rejected_ids"]))

        rows = StreamFilter(
            name,
            pair,
            bos=self._tokenizer.bos_token_id,
            is_blank=partial(is_blank, self._tokenizer),
            workers=args.dataloader_num_workers,
            position=ROW,
        )
        self._stream_filters.append(rows)
        stream = checked_stream(stream, name, self._tokenizer).filter(rows.has_responses)
        if next(iter(stream), None) is None:
            raise nothing_left(name)
        whole = copy.copy(args)
        whole.max_length = None  # TRL would silently drop long prompts
        prepared = super()._prepare_dataset(stream, processing_class, whole, name)
        return self._ready.add(prepared.filter(rows.is_trainable))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns
        wanted = (*SCORE_COLUMNS, self.args.length_column_name)
        self._signature_columns: Any = [*columns, *(c for c in wanted if c not in columns)]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if dataset in self._ready:
            return dataset
        if self._source.released:
            raise BDPOError(
                f"The {name} data has no scores, and the reference (a separate model, or the copy "
                "of the adapter given) was released after the reference pass over the datasets "
                "that the trainer was made with. Give it to the trainer's constructor as an "
                "`eval_dataset`, or set `bdpo_precompute: false`."
            )
        if self._made:
            return self._prepared([(name, dataset)], later=True)[0]
        self._prepare_datasets()  # all of them; TRL asks for the training data first
        return self.train_dataset

    def _pairs(self, dataset: Dataset, name: str) -> Sequence[Pair]:
        return dataset_pairs(dataset, getattr(self.data_collator, "collator", self.data_collator))

    def _filtered(self, stream: Any, name: str) -> Any:
        return stream  # since it was tokenised

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Scores new data first, as `evaluate` does; else as `trl.DPOTrainer.predict`.

        Raises:
            BDPOError: the data cannot be trained on, or there is no reference left to score it.
        """
        if test_dataset not in self._ready:
            separate = self.ref_model is not None or self._source.released
            gone = self.state.global_step > 0 and not (separate or is_peft_model(self.model))
            if self.settings.precompute and gone:
                raise BDPOError(
                    "The data given to predict() has no scores, and the model that they come from, "
                    "the one before training, has been trained since. Give the data to the "
                    "trainer's constructor as an `eval_dataset` (a dictionary of several, say) and "
                    "pass it on from there, or set `bdpo_precompute: false`."
                )
            test_dataset = self._prepare_dataset(
                test_dataset, self.processing_class, self.args, "test"
            )
            if self.settings.precompute:
                test_dataset = self._precompute_ref_logps(test_dataset, "test", 0)
        return super().predict(test_dataset, *args, **kwargs)

    def _tokenised(self, dataset: Dataset, name: str) -> Tokenised:
        processes = self.args.dataset_num_proc
        responses = token_rows(dataset, TOKENISED[1:])
        return Tokenised(
            pairs=self._pairs(dataset, name),
            lengths=[(len(chosen), len(rejected)) for chosen, rejected in responses],
            prompt_boundary_mismatch=prompt_boundary_mismatches(
                dataset, self._tokenizer, name, processes
            ),
            rows=list(dataset[ROW]),
            names=list(dataset[FILE_ROW]) if FILE_ROW in dataset.column_names else None,
        )

    # The step -----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        batch = preference_batch(inputs)
        if self.aux_loss_enabled:
            batch.inputs["output_router_logits"] = True
        loss, metrics, outputs = self._step(model, inputs, batch)
        if self.aux_loss_enabled:
            of_router = getattr(outputs, "aux_loss", None)
            if of_router is None:
                raise BDPOError(
                    f"`router_aux_loss_coef: {self.router_aux_loss_coef}` cannot be used with this "
                    "model, which computes no loss of its router. Set `router_aux_loss_coef: 0` "
                    "(Axolotl: `model_config: {router_aux_loss_coef: 0}`)."
                )
            loss = loss + self.router_aux_loss_coef * of_router
            metrics["aux_loss"] = (of_router, torch.ones_like(of_router))
        self._sums["train" if self.model.training else "eval"].add(metrics)
        if not return_outputs:
            return loss
        with torch.no_grad():  # `compute_metrics` needs the logits of all positions
            return loss, model(**preference_batch(inputs).inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Count the training tokens since the last log before an evaluation reports their total.
        for mode, sums in self._sums.items():
            for step in sums.drain():
                tokens = step.pop(TOTAL)
                self._total_train_tokens += round(tokens) if mode == "train" else 0
                for name, value in step.items():
                    self._metrics[mode][name].append(value)
                self._metrics[mode][TOTAL] = [self._total_train_tokens]
        add_peak_memory(logs, self.args.device)
        super().log(logs, start_time)
