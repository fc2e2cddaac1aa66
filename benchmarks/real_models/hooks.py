"""What the runs add to Axolotl, as plugins named in their configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from torch import Tensor
from transformers import Trainer, TrainerCallback

from bdpo_plugin import BalanceWeights
from bdpo_plugin.hosts.axolotl import AxolotlBDPOTrainer
from bdpo_plugin.settings import BDPOError, BDPOSettings
from benchmarks.real_models.control import kinds_file, weigh

SHUFFLED_TRAINER = "benchmarks.real_models.hooks.ShuffledTrainer"


class _KeepLog(TrainerCallback):
    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            state.save_to_json(str(Path(args.output_dir, "trainer_state.json")))


class Hooks(BasePlugin):
    """For every method: a seeded start, and the log of the run in its output folder.

    Axolotl leaves the seed of a new adapter to chance; here the methods of one seed begin with
    the same one, so that their difference is the method's.
    """

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: Any) -> list[TrainerCallback]:
        torch.manual_seed(cfg.seed)  # the trainer, and in it the adapter, is made next
        return [_KeepLog()]


class Shuffled(Hooks):
    """The control: `rl: bdpo` with :class:`ShuffledTrainer` as its `trainer_cls`.

    B-DPO refuses any `trainer_cls`, so that a run whose plugin is missing does not begin. This one
    takes it out before B-DPO's plugin sees it, and puts it back when the trainer is made.
    """

    def register(self, cfg: DictDefault) -> None:
        if cfg.get("trainer_cls") == SHUFFLED_TRAINER:
            del cfg["trainer_cls"]

    def get_training_args(self, cfg: DictDefault) -> None:
        cfg.trainer_cls = SHUFFLED_TRAINER

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Raise BDPOError if the MI would not be shuffled; nothing has been trained yet."""
        if not isinstance(trainer, ShuffledTrainer):
            raise BDPOError(f"The control needs a ShuffledTrainer, not {type(trainer).__name__}.")


class ShuffledTrainer(AxolotlBDPOTrainer):
    """B-DPO in which each pair has the weights of another one of its kind, by the run's seed."""

    def __init__(
        self, model: Any, ref_model: Any = None, args: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        settings = BDPOSettings.from_keys(vars(args))
        if not settings.precompute:
            raise BDPOError("The control shuffles a whole dataset: it needs `bdpo_precompute`.")

        def shuffled(*mi: Tensor) -> BalanceWeights:
            return weigh("shuffled", settings, args.seed, self.kinds, *mi)

        super().__init__(model, ref_model, args, *rest, weigh=shuffled, **kwargs)

    def _usable(self, dataset: Any, name: str) -> Any:
        """And keep the kinds of the pairs that are left, which the shuffle is within."""
        kept = super()._usable(dataset, name)
        self.kinds = list(kept[0]["kind"])
        if self.accelerator.is_main_process:
            (file := kinds_file(self.args.output_dir)).parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.kinds))
        return kept
