"""The changes of B-DPO to a trainer that are the same for all hosts. Each host's trainer inherits
:class:`RunMixin`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.model.device import dtypes_kept
from bdpo_plugin.objective import bdpo_loss
from bdpo_plugin.output.model_card import complete_card
from bdpo_plugin.output.run_record import FirstSteps, first_steps, write_record
from bdpo_plugin.output.tables import print_warning
from bdpo_plugin.output.weighing_record import CallableRecord
from bdpo_plugin.reference.reference_source import ReferenceSource
from bdpo_plugin.settings import BDPOError, BDPOSettings
from bdpo_plugin.training.batch import PreferenceBatch
from bdpo_plugin.training.checkpoints import check_checkpoint, write_description
from bdpo_plugin.training.datasets import (
    ReadyDatasets,
    Tokenised,
    Usable,
    description_of,
    stream_refusal,
    usable_rows,
    with_scores,
)
from bdpo_plugin.training.main_rank import by_main
from bdpo_plugin.training.score_columns import LENGTH, batch_scores, unscored
from bdpo_plugin.training.scorer import Scorer, Weigh, asked_columns
from bdpo_plugin.training.step import LossTerms, Metrics, preference_step
from bdpo_plugin.training.streams import StreamFilter
from bdpo_plugin.training.template_dates import TemplateDates

if TYPE_CHECKING:

    class _Trainer(Trainer):
        """The attributes of a host's trainer that this module uses."""

        train_dataset: Any
        eval_dataset: Any
        data_collator: Any

else:
    _Trainer = object


class RunMixin(_Trainer):
    """Prepares the datasets of a trainer, makes its checkpoints exactly resumable, and computes the
    training step.

    It is a mixin for a trainer like `trl.DPOTrainer`, which must call :meth:`_begin` first.

    Attributes:
        settings: the settings of the run.
        scorer: the scorer of the run; it is created with the first dataset, whose prompts determine
            the null prompt.
        configuration: the configuration of the host, including changes by its command line and
            without keys that are not needed to run it again; for the run record and the model card.
    """

    #: The host whose command starts a run of this trainer.
    host = "trl"
    #: The `strftime` formats of dates that the host itself writes into prompts.
    host_dates: Sequence[str] = ()
    #: The loss of each pair; a subclass that studies another loss may replace it.
    pair_loss = staticmethod(bdpo_loss)

    settings: BDPOSettings
    scorer: Scorer
    configuration: Mapping[str, Any] | None = None
    # set by the host's trainer
    _terms: LossTerms
    _tokenizer: Any

    def _begin(self, settings: BDPOSettings, args: Any, weigh: Weigh | None = None) -> None:
        self.settings = settings
        self._weigh = weigh
        if (asked := asked_columns(weigh)) and not settings.precompute:
            raise BDPOError(
                f"The `weigh` callable asks for {', '.join(asked)}: columns of the data are given "
                "to it before training only. Set `bdpo_precompute: true`."
            )
        self._ready = ReadyDatasets()
        self._streams: list[StreamFilter] = []
        self._training_pairs: dict[str, str] = {}  # digests; empty until the pairs are prepared
        self._usable: dict[tuple[str, str], Usable] = {}  # by name and fingerprint of the dataset
        if args.length_column_name == "length":  # the default; data may have a column of this name
            args.length_column_name = LENGTH

    # Each host implements these.

    @cached_property
    def _source(self) -> ReferenceSource:
        """The source of the run's reference model."""
        raise NotImplementedError

    def _tokenised(self, dataset: Dataset, name: str) -> Tokenised:
        """Reads the pairs of a host's tokenised dataset."""
        raise NotImplementedError

    # The datasets -------------------------------------------------------------------------------

    def _given_datasets(self) -> dict[str, Any]:
        """Returns the datasets that the trainer was given, by name."""
        evaluation = self.eval_dataset
        if not isinstance(evaluation, dict):
            evaluation = {"eval": evaluation}
        given = {"train": self.train_dataset, **evaluation}
        return {name: dataset for name, dataset in given.items() if dataset is not None}

    def _look_at_datasets(self) -> None:
        """Checks all datasets before the first one is scored.

        Raises:
            BDPOError: A dataset has an error that would otherwise end the run after the reference
                pass over the training data.
        """
        given = self._given_datasets()
        if self.settings.precompute:
            for name, dataset in given.items():
                if not isinstance(dataset, Dataset):
                    raise stream_refusal(name)
        looked = [self._look_at(d, name) for name, d in given.items() if isinstance(d, Dataset)]
        if looked and self.settings.precompute:
            scorer = self._scorer_for(looked[0].pairs)
            for usable in looked:
                scorer.check_room(usable.pairs, usable.rows, self._source.before_training())

    def _look_at(self, dataset: Dataset, name: str) -> Usable:
        """Selects the rows of a tokenised dataset that can be trained on, and keeps them."""
        usable = usable_rows(
            dataset,
            self._tokenised(dataset, name),
            name,
            tokenizer=self._tokenizer,
            control_column=self.settings.control_column,
            asked=asked_columns(self._weigh),
            main=self.is_world_process_zero(),
        )
        self._usable[name, dataset._fingerprint] = usable
        return usable

    def _prepare_datasets(self) -> None:
        """Prepares the datasets that the trainer was given and its host has tokenised."""
        self._look_at_datasets()
        if self.train_dataset is not None:
            self.train_dataset = self._prepared(self.train_dataset, "train", train=True)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._prepared(dataset, name) for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._prepared(self.eval_dataset, "eval")

    def _prepared(
        self, dataset: Any, name: str, *, train: bool = False, later: bool = False
    ) -> Any:
        """Prepares a tokenised dataset for training; returns a stream unchanged."""
        if not isinstance(dataset, Dataset):
            return dataset
        key = (name, dataset._fingerprint)
        usable = self._usable.pop(key, None) or self._look_at(dataset, name)
        scorer = self._scorer_for(usable.pairs)
        if train:
            self._training_pairs = description_of(usable.pairs, self._tokenizer, self._dates)
        reference = self._source.before_training if self.settings.precompute else None
        return self._ready.add(with_scores(usable, scorer, reference, train=train, later=later))

    @cached_property
    def _dates(self) -> TemplateDates | None:
        """The dates that the chat template writes into the prompts."""
        return TemplateDates.of(self._tokenizer, self.host_dates)

    def _scorer_for(self, pairs: Sequence[Pair]) -> Scorer:
        """Returns the scorer of the run; creates it from these pairs if there is none yet."""
        if not hasattr(self, "scorer"):
            source = self._source
            self.scorer = Scorer.from_prompts(
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
        return self.scorer

    def _checked(self, dataset: Any, name: str) -> Any:
        if dataset is None or dataset in self._ready:
            return dataset
        if self.settings.precompute:
            raise unscored(f"The {name} data")
        return self._prepared(dataset, name, later=True)

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

        Args:
            model: the policy as prepared for training.
            columns: the host's batch.
            batch: the same batch in the form common to all hosts.
        """
        reader = self.scorer.reader
        with ExitStack() as stack:
            if self.settings.precompute:
                scores = batch_scores(columns)
            else:
                mask = batch.inputs["attention_mask"]
                stack.enter_context(reader.padded_alike(mask.shape[1] + bool(mask.all())))
                scores = self.scorer.score_batch(batch.pairs(), self._source.during_step(model))
            loss, metrics, outputs = preference_step(
                reader, model, batch, scores, self._terms, self.pair_loss
            )
        if self.settings.control is not None:
            metrics["bdpo/control"] = (torch.ones_like(loss), torch.ones_like(loss))
        return loss, metrics, outputs

    # The checkpoints ----------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise BDPOError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
        if resume_from_checkpoint:
            plain = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            warnings = check_checkpoint(
                resume_from_checkpoint,
                self._description(),
                self._tokenizer,
                self._dates,
                optimizer=plain,
            )
            if self.is_world_process_zero():
                for warning in warnings:
                    print_warning(warning)
        if (steps := first_steps()) is not None:
            self.add_callback(FirstSteps(steps, self.args.output_dir))  # after all other callbacks
        self._write_record()
        done = super().train(resume_from_checkpoint or None, *args, **kwargs)
        self._write_record(done.metrics, resumed=bool(resume_from_checkpoint))
        return done

    def _write_record(
        self, finished: Mapping[str, float] | None = None, *, resumed: bool = False
    ) -> None:
        folder = Path(self.args.output_dir, "bdpo")
        by_main(
            self.is_world_process_zero(),
            lambda: write_record(self, finished, resumed=resumed),
            f"write its record into {folder}",
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        loaded = self.model if model is None else model
        with dtypes_kept(loaded):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            # If the checkpoint has folders of other adapters, such as a frozen reference,
            # transformers does not load the adapter that is trained.
            if any(Path(resume_from_checkpoint).glob("*/adapter_model.*")):
                adapter = loaded.active_adapters[0]
                loaded.load_adapter(resume_from_checkpoint, adapter, is_trainable=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Written before the weights: a run that is killed in between then leaves a description
        # without weights, and not weights without a description.
        write_description(output_dir or self.args.output_dir, self._description())
        super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            weighing = self.scorer.weighing
            complete_card(
                self.args.output_dir,
                self.settings,
                configuration=self.configuration,
                weighing=weighing.words() if weighing else None,
            )

    def _description(self) -> dict[str, Any]:
        """Describes everything, other than the host's own settings, that the losses of the run
        depend on."""
        own = None if self.pair_loss is bdpo_loss else CallableRecord.of(self.pair_loss).to_dict()
        scored = self.scorer.description(self._training_pairs)
        return {**scored, "pair_loss": own, "loss": asdict(self._terms)}
