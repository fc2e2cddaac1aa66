"""The trainer for Axolotl: B-DPO's trainer with Axolotl's additions to TRL's DPO trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from bdpo_plugin.hosts.trl import BDPOTrainer
from bdpo_plugin.hosts.trl.config import BDPOArguments
from bdpo_plugin.output.model_card import TAGS


@dataclass
class AxolotlBDPOConfig(AxolotlDPOConfig, BDPOArguments):
    """Axolotl's DPO arguments with the ``bdpo_*`` fields."""


class _AxolotlDPOTrainer(AxolotlDPOTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # Skip AxolotlDPOTrainer's method, which collects garbage and empties the CUDA cache after
        # every step. Users who need that have `gc_collect_steps` and `torch_empty_cache_steps`.
        return super(AxolotlDPOTrainer, self).training_step(*args, **kwargs)


class AxolotlBDPOTrainer(BDPOTrainer, _AxolotlDPOTrainer):
    """:class:`~bdpo_plugin.hosts.trl.BDPOTrainer` with Axolotl's samplers, schedulers, optimizers,
    tokenisation and model-card tags."""

    host = "axolotl"
    _tag_names = ["axolotl", "trl", *TAGS]  # noqa: RUF012
    tag_names = [*AxolotlDPOTrainer.tag_names, "bdpo"]  # noqa: RUF012
