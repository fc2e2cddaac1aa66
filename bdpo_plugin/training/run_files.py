"""What a run writes beside the weights, and how it goes on from a checkpoint: the same for the
trainers of all hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from bdpo_plugin.model.device import dtypes_kept
from bdpo_plugin.objective import bdpo_loss
from bdpo_plugin.output.model_card import complete_card
from bdpo_plugin.output.run_record import FirstSteps, first_steps, write_record
from bdpo_plugin.output.tables import print_warning
from bdpo_plugin.output.weighing_record import callable_record, in_words
from bdpo_plugin.settings import BDPOError, BDPOSettings
from bdpo_plugin.training.checkpoints import check_checkpoint, write_description
from bdpo_plugin.training.main_rank import by_main
from bdpo_plugin.training.scorer import Scorer
from bdpo_plugin.training.step import LossTerms
from bdpo_plugin.training.template_dates import TemplateDates

if TYPE_CHECKING:

    class _Trainer(Trainer):
        """The attributes of a host's trainer that these mixins use."""

        train_dataset: Any
        eval_dataset: Any
        data_collator: Any

else:
    _Trainer = object


class RunFilesMixin(_Trainer):
    """Makes the checkpoints of a trainer exactly resumable, and writes the run record and the model
    card.

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
    # digests; empty until the pairs are prepared
    _training_pairs: dict[str, str]

    @cached_property
    def _dates(self) -> TemplateDates | None:
        """The dates that the chat template writes into the prompts."""
        return TemplateDates.of(self._tokenizer, self.host_dates)

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
                weighing=in_words(weighing) if weighing else None,
                log=self.state.log_history,
            )

    def _description(self) -> dict[str, Any]:
        """Describes everything, other than the host's own settings, that the losses of the run
        depend on."""
        own = None if self.pair_loss is bdpo_loss else callable_record(self.pair_loss)
        scored = self.scorer.description(self._training_pairs)
        return {**scored, "pair_loss": own, "loss": asdict(self._terms)}
