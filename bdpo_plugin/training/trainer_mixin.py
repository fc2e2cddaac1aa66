"""The changes of B-DPO to a trainer that are the same for all hosts. Each host's trainer inherits
:class:`RunMixin`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.output.score_file import score_file
from bdpo_plugin.reference.reference_source import ReferenceSource
from bdpo_plugin.settings import BDPOError, BDPOSettings
from bdpo_plugin.training.batch import PreferenceBatch
from bdpo_plugin.training.datasets import (
    ReadyDatasets,
    Tokenised,
    Usable,
    description_of,
    digest,
    peek,
    stream_refusal,
    usable_rows,
)
from bdpo_plugin.training.run_files import RunFilesMixin
from bdpo_plugin.training.score_columns import (
    LENGTH,
    batch_scores,
    longest,
    score_columns,
    unscored,
    with_columns,
)
from bdpo_plugin.training.scorer import Scorer
from bdpo_plugin.training.step import Metrics, preference_step
from bdpo_plugin.training.streaming_data import StreamFilter
from bdpo_plugin.training.weighing import Weigh, asked_columns


class RunMixin(RunFilesMixin):
    """Prepares the datasets of a trainer and computes its training step. What it writes is
    :class:`~bdpo_plugin.training.run_files.RunFilesMixin`'s.

    It is a mixin for a trainer like `trl.DPOTrainer`, which must call :meth:`_begin` first.

    """

    #: The columns of a dataset that the host has tokenised, with its pairs.
    tokenised_columns: Sequence[str] = ()

    def _begin(self, settings: BDPOSettings, args: Any, weigh: Weigh | None = None) -> None:
        self.settings = settings
        self._weigh = weigh
        if (asked := asked_columns(weigh)) and not settings.precompute:
            raise BDPOError(
                f"The `weigh` callable asks for {', '.join(asked)}: columns of the data are given "
                "to it before training only. Set `bdpo_precompute: true`."
            )
        self._ready = ReadyDatasets()
        self._stream_filters: list[StreamFilter] = []
        self._training_pairs = {}
        if args.length_column_name == "length":  # the default; data may have a column of this name
            args.length_column_name = LENGTH

    # Each host implements these.

    @cached_property
    def _source(self) -> ReferenceSource:
        """The source of the run's reference model."""
        raise NotImplementedError

    def _pairs(self, dataset: Dataset, name: str) -> Sequence[Pair]:
        """Returns the pairs of a host's tokenised dataset, after truncation."""
        raise NotImplementedError

    def _tokenised(self, dataset: Dataset, name: str) -> Tokenised:
        """Returns the pairs of a host's tokenised dataset, with what is known of their rows."""
        raise NotImplementedError

    def _filtered(self, stream: Any, name: str) -> Any:
        """Returns a stream without the pairs that cannot be trained on."""
        raise NotImplementedError

    # The way of a pair --------------------------------------------------------------------------

    def _prepare_datasets(self) -> None:
        """Prepares the datasets that the trainer was given and its host has tokenised."""
        train, evaluation = self.train_dataset, self.eval_dataset
        if not isinstance(evaluation, dict):
            evaluation = {} if evaluation is None else {"eval": evaluation}
        given = [] if train is None else [("train", train)]
        ready = self._prepared([*given, *evaluation.items()], train=train is not None)
        if train is not None:
            self.train_dataset = ready.pop(0)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = dict(zip(evaluation, ready, strict=True))
        elif evaluation:
            (self.eval_dataset,) = ready

    def _prepared(
        self, given: Sequence[tuple[str, Any]], *, train: bool = False, later: bool = False
    ) -> list[Any]:
        """Prepares tokenised datasets for training: reads their rows as pairs, drops the pairs that
        cannot be trained on, finds the null prompt, scores and weighs the pairs under the
        reference, and adds the results as columns.

        All datasets are checked before the first one is scored, so that no run stops after the
        reference pass because of an error that could be found before. Without `bdpo_precompute`
        pairs are scored in the training steps (:meth:`_step`), and a dataset may be a stream.

        Args:
            train: whether the first of them has the training pairs.
            later: whether they were given after the trainer was created. They may then have the
                same names as others.

        Raises:
            BDPOError: A dataset cannot be trained on, or the reference cannot score a pair.
        """
        precompute = self.settings.precompute
        checked: list[Any] = []
        for name, dataset in given:
            if isinstance(dataset, Dataset):
                checked.append(self._usable(dataset, name))
            elif precompute:
                raise stream_refusal(name)
            else:
                checked.append(self._filtered(dataset, name))
        if not hasattr(self, "scorer") and given:
            self.scorer = self._new_scorer(self._first_pairs(checked[0], given[0][0]))
        tables = [one for one in checked if isinstance(one, Usable)]
        if train and tables and tables[0] is checked[0]:
            self._training_pairs = description_of(tables[0].pairs, self._tokenizer, self._dates)
        if precompute:
            reference = self._source.before_training()
            for one in tables:
                self.scorer.check_room(one.pairs, one.rows, reference)
        ready = []
        for one in checked:
            dataset = one
            if isinstance(one, Usable):
                columns = {LENGTH: longest(one.pairs)}
                if precompute:
                    scores = self.scorer.score(one, reference)
                    weights = self.scorer.weights(scores, one)
                    name = "" if train and one is checked[0] else one.name
                    file = score_file(name, digest(one.pairs) if later else "")
                    self.scorer.save(one, scores, weights, file=file)
                    columns |= score_columns(scores, weights)
                dataset = with_columns(one.dataset, columns)
            ready.append(self._ready.add(dataset))
        return ready

    def _usable(self, dataset: Dataset, name: str) -> Usable:
        """Selects the rows of a tokenised dataset that can be trained on."""
        return usable_rows(
            dataset,
            self._tokenised(dataset, name),
            name,
            tokenizer=self._tokenizer,
            control_column=self.settings.control_column,
            asked=asked_columns(self._weigh),
            main=self.is_world_process_zero(),
        )

    def _first_pairs(self, checked: Any, name: str) -> Sequence[Pair]:
        """Returns the pairs of a dataset, or the first pairs of a stream."""
        if isinstance(checked, Usable):
            return checked.pairs
        pairs = self._pairs(peek(checked, name, self.tokenised_columns), name)
        for rows in self._stream_filters:
            rows.start_counting()  # training reads these rows again
        return pairs

    def _new_scorer(self, pairs: Sequence[Pair]) -> Scorer:
        """Creates the scorer of the run; the prompts of these pairs determine the null prompt."""
        source = self._source
        return Scorer(
            self.settings,
            self._tokenizer,
            self.accelerator,
            self.args.output_dir,
            self.args.seed,
            self._weigh,
            pairs=pairs,
            reference=source.before_training()
            if self.settings.precompute
            else source.during_step(self.model),
        )

    def _checked(self, dataset: Any, name: str) -> Any:
        """Returns a dataset that is about to be used, prepared if it is not."""
        if dataset is None or dataset in self._ready:
            return dataset
        if self.settings.precompute:
            raise unscored(f"The {name} data")
        return self._prepared([(name, dataset)], later=True)[0]

    def get_train_dataloader(self) -> Any:
        self.train_dataset = self._checked(self.train_dataset, "training")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if isinstance(eval_dataset, str):
            of_name = self.eval_dataset
            of_name[eval_dataset] = self._checked(of_name[eval_dataset], eval_dataset)
        elif eval_dataset is not None:
            eval_dataset = self._checked(eval_dataset, "evaluation")
        else:
            self.eval_dataset = self._checked(self.eval_dataset, "evaluation")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return super().get_test_dataloader(self._checked(test_dataset, "test"))

    # The step -----------------------------------------------------------------------------------

    def _step(
        self, model: nn.Module, columns: Mapping[str, Any], batch: PreferenceBatch
    ) -> tuple[Tensor, Metrics, Any]:
        """Calls :func:`preference_step` on a batch, with the scores in the batch or, without
        `bdpo_precompute`, with scores computed now.
        """
        reader = self.scorer.reader
        with ExitStack() as stack:
            if self.settings.precompute:
                scores = batch_scores(columns)
            else:
                _, mask, _ = batch.on_cpu
                stack.enter_context(reader.padded_alike(mask.shape[1] + bool(mask.all())))
                scores = self.scorer.score_batch(batch.pairs(), self._source.during_step(model))
            loss, metrics, outputs = preference_step(
                reader, model, batch, scores, self._terms, self.pair_loss
            )
        if self.settings.control is not None:
            metrics["bdpo/control"] = (torch.ones_like(loss), torch.ones_like(loss))
        return loss, metrics, outputs
