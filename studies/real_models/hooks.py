"""What the runs add to Axolotl, as plugins named in their configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from transformers import TrainerCallback

SHUFFLED_TRAINER = "studies.real_models.hooks.ShuffledTrainer"


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
