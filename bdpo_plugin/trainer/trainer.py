"""DPO with balance weights: what changes of TRL's trainer, and nothing else."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from trl import DPOTrainer

from bdpo_plugin.pairs import Pair, first_rows
from bdpo_plugin.run.columns import (
    LENGTH,
    ROW,
    SCORE_COLUMNS,
    ReadyDatasets,
    ScoreCollator,
    batch_scores,
    drop_reserved,
    with_columns,
)
from bdpo_plugin.run.mixin import RunMixin
from bdpo_plugin.run.reference_source import release_reference, resolve_reference
from bdpo_plugin.run.report import add_peak_memory, print_problems, score_file
from bdpo_plugin.run.scorer import Balance, Balancer, digest, longest
from bdpo_plugin.run.step import LossTerms, MetricSums, preference_step
from bdpo_plugin.run.stream import StreamFilter, TellStreams
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.trainer.checks import check_arguments, check_columns, check_launch
from bdpo_plugin.trainer.config import BDPOConfig
from bdpo_plugin.trainer.data import (
    TOKENISED,
    batch_pairs,
    dataset_pairs,
    misplaced_rows,
    model_inputs,
    nothing_left,
    peek,
    stream_refusal,
)
from bdpo_plugin.trainer.raw import (
    check_datasets,
    checked_stream,
    given_arguments,
    given_datasets,
    unreadable_told,
    without_mistaken,
    without_rows,
)


class BDPOTrainer(RunMixin, DPOTrainer):
    """Balanced Direct Preference Optimization (arXiv 2603.22829, as read in the README).

    What it changes of `trl.DPOTrainer`: the precomputation of the reference's log-probabilities
    also gives the mutual information of both responses with their query, and from it the balance
    weights; and the loss weighs the two log-ratios with them, reading the model at the response
    positions alone. Rewards stay plain DPO rewards.

    Args:
        model, ref_model: as in `trl.DPOTrainer`.
        args: a :class:`BDPOConfig`.
        *rest, **kwargs: of `trl.DPOTrainer`.
        balance: (mi_chosen, mi_rejected), each (B,), ->
            :class:`~bdpo_plugin.objective.BalanceWeights`, in the place of the built-in
            :func:`~bdpo_plugin.objective.balance_weights`. It is called once for a whole
            dataset, or for each batch where ``bdpo_precompute`` is off.

    Raises:
        BDPOError: a setting that cannot be honoured, or data that cannot be trained on.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: BDPOConfig | None = None,
        *rest: Any,
        balance: Balance | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else BDPOConfig(output_dir="bdpo-output")
        self.bdpo = check_arguments(args)
        args.precompute_ref_log_probs = self.bdpo.precompute
        self._balance = balance
        self._balancer: Balancer | None = None
        self._ready = ReadyDatasets()
        self._reference_released = self._made = False
        self._streams: list[StreamFilter] = []
        if args.length_column_name == "length":  # the host's default, which data may have too
            args.length_column_name = LENGTH
        check_columns([*rest, *kwargs.values()])
        given = given_arguments(rest, kwargs)
        self._empty = check_datasets(
            given_datasets(given), given.get("processing_class"), args.pad_token
        )
        super().__init__(model, ref_model, args, *rest, **kwargs)
        reduce = partial(self.accelerator.reduce, reduction="sum")
        self._sums = {"train": MetricSums(reduce), "eval": MetricSums(reduce)}
        self._terms = LossTerms(self.loss_types, self.loss_weights, self.beta, self.label_smoothing)
        if self.bdpo.precompute:
            self._reference_released = release_reference(self)
        else:
            self._prepare_stepwise()
        self.data_collator = ScoreCollator(self.data_collator)
        self.add_callback(TellStreams(self.accelerator, self._streams))
        self._made = True

    @property
    def balancer(self) -> Balancer:
        """What checks, scores and weighs the pairs of this run."""
        if self._balancer is None:  # TRL asks for scores from within its constructor
            check_launch(self.accelerator, self.args.n_gpu)
            self._balancer = Balancer(
                self.bdpo, self._tokenizer, self.accelerator, self.args.output_dir, self._balance
            )
        return self._balancer

    # The datasets -------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        if dataset in self._ready:
            return dataset
        if self._made:
            self._empty = check_datasets([(name, dataset)], self._tokenizer, args.pad_token)
        empty = self._empty.get(id(dataset), ())
        dataset, problems = drop_reserved(without_mistaken(dataset), name)
        if args.process_index == 0:
            print_problems(problems)
        if isinstance(dataset, IterableDataset):
            return self._prepare_stream(dataset, processing_class, args, name)
        dataset = dataset.add_column(ROW, list(range(len(dataset))))
        dataset, problems = without_rows(dataset, empty, name)
        if args.process_index == 0:
            print_problems(problems)
        with unreadable_told(dataset, name, self._tokenizer):
            prepared = super()._prepare_dataset(dataset, processing_class, args, name)
        if lost := len(dataset) - len(prepared):
            rows = sorted(set(dataset[ROW]) - set(prepared[ROW]))
            problem = (
                f"{lost} of {len(dataset)} pairs of the {name} data: the prompt alone fills the "
                f"sequence length of {args.max_length} tokens (dropped; rows {first_rows(rows)})"
            )
            if not len(prepared):
                raise BDPOError(f"{problem}. Nothing is left to train on: raise that length.")
            if args.process_index == 0:
                print_problems([problem])
        return prepared

    def _prepare_stream(self, stream: Any, processing_class: Any, args: Any, name: str) -> Any:
        """The tokenised stream without the pairs that cannot teach, which are counted."""

        def pair(row: Any) -> tuple[Pair, tuple[int, int]]:
            collator = getattr(self.data_collator, "collator", self.data_collator)
            (found,) = batch_pairs(collator([{column: row[column] for column in TOKENISED}]))
            return found, (len(row["chosen_ids"]), len(row["rejected_ids"]))

        rows = StreamFilter(
            name,
            pair,
            bos=self._tokenizer.bos_token_id,
            is_blank=lambda response: self.balancer.is_blank(response),
            workers=args.dataloader_num_workers,
            position=ROW,
        )
        self._streams.append(rows)
        stream = checked_stream(stream, name, self._tokenizer).filter(rows.has_messages)
        if next(iter(stream), None) is None:
            raise nothing_left(name)
        whole = copy.copy(args)
        whole.max_length = None  # TRL would drop long prompts without a word
        prepared = super()._prepare_dataset(stream, processing_class, whole, name)
        return self._ready.add(prepared.filter(rows.teaches))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        wanted = (*SCORE_COLUMNS, self.args.length_column_name)
        missing = [c for c in wanted if c not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *missing]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if isinstance(dataset, IterableDataset):
            raise stream_refusal(name)
        if dataset in self._ready:
            return dataset
        if self._reference_released:
            raise BDPOError(
                f"The {name} data has no scores, and the reference (a separate model, or the copy "
                "of the adapter given) was let go after the pass over the datasets that the "
                "trainer was made with. Give it to the trainer's constructor as an `eval_dataset`, "
                "or set `bdpo_precompute: false`."
            )
        of_training = dataset is self.train_dataset
        dataset, rows, pairs = self._usable(dataset, name)
        if of_training:
            self.balancer.take_training_pairs(pairs)
        columns = self.balancer.score_dataset(
            pairs,
            rows,
            name,
            resolve_reference(self),
            score_file("" if of_training else name, digest(pairs) if self._made else ""),
        )
        return self._ready.add(with_columns(dataset, columns))

    def _usable(self, dataset: Dataset, name: str) -> tuple[Dataset, list[int], list[Pair]]:
        """The dataset without the pairs that cannot teach; the row numbers and pairs kept."""
        collator = getattr(self.data_collator, "collator", self.data_collator)
        pairs = dataset_pairs(dataset, collator)
        misplaced = misplaced_rows(dataset, self._tokenizer, name)
        lengths = [
            (len(chosen), len(rejected))
            for chosen, rejected in zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
        ]
        numbers = list(dataset[ROW])
        kept = self.balancer.usable_rows(pairs, name, lengths, misplaced, numbers)
        if len(kept) < len(pairs):
            dataset = dataset.select(kept)
        return dataset, [numbers[i] for i in kept], [pairs[i] for i in kept]

    def _prepare_stepwise(self) -> None:
        """Without a pass: check the data that can be checked, and settle the null prompt."""
        if isinstance(self.train_dataset, IterableDataset):
            pairs = dataset_pairs(peek(self.train_dataset, "train", TOKENISED), self.data_collator)
            for stream in self._streams:
                stream.start_counting()
        else:
            self.train_dataset, pairs = self._checked_pairs(self.train_dataset, "train")
            self.balancer.take_training_pairs(pairs)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._prepared_later(dataset, name)
                for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._prepared_later(self.eval_dataset, "eval")
        self.balancer.find_null_prompt(pairs, resolve_reference(self, self.model))

    def _checked_pairs(self, dataset: Dataset, name: str) -> tuple[Dataset, list[Pair]]:
        dataset, _, pairs = self._usable(dataset, name)
        return self._ready.add(with_columns(dataset, {LENGTH: longest(pairs)})), pairs

    def _prepared_later(self, dataset: Any, name: str) -> Any:
        return self._checked_pairs(dataset, name)[0] if isinstance(dataset, Dataset) else dataset

    # The step -----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self.bdpo.precompute:
            scores = batch_scores(inputs)
        else:
            scores = self.balancer.score_batch(batch_pairs(inputs), resolve_reference(self, model))
        kwargs = model_inputs(inputs)
        if self.aux_loss_enabled:
            kwargs["output_router_logits"] = True
        loss, metrics, outputs = preference_step(
            self.balancer.reader,
            model,
            kwargs,
            inputs["completion_mask"].bool(),
            scores,
            self._terms,
        )
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = (outputs.aux_loss, torch.ones_like(outputs.aux_loss))
        self._sums["train" if self.model.training else "eval"].add(metrics)
        if not return_outputs:
            return loss
        with torch.no_grad():  # for `compute_metrics`, which wants all logits
            return loss, model(**model_inputs(inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for step in self._sums[mode].drain():
            tokens = step.pop("num_tokens")
            self._total_train_tokens += round(tokens) if mode == "train" else 0
            for name, value in step.items():
                self._metrics[mode][name].append(value)
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        add_peak_memory(logs, self.args.device)
        super().log(logs, start_time)
