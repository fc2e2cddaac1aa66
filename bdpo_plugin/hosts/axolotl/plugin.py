"""The plugin of Axolotl's plugin manager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault
from transformers import Trainer, set_seed

from bdpo_plugin.hosts.axolotl.evaluating import is_evaluation, wrap_evaluation
from bdpo_plugin.hosts.axolotl.limits import check_trained
from bdpo_plugin.hosts.axolotl.rewrite_config import MARK, PLUGIN, WRITTEN, check_resolved, resolve
from bdpo_plugin.hosts.axolotl.schema import for_sharing
from bdpo_plugin.limits import check_complete
from bdpo_plugin.redact import redacted
from bdpo_plugin.settings import BDPOError, BDPOSettings


class BDPOPlugin(BasePlugin):
    """`rl: bdpo` in Axolotl. Without that key in a configuration, none of its hooks does anything.

    It keeps no state: one process may hold several configurations, B-DPO's and others.
    """

    def register(self, cfg: DictDefault) -> None:
        """Rewrite a raw B-DPO configuration (see :func:`~.resolve.resolve`)."""
        written = None
        if cfg.get("rl") == "bdpo":
            raw = DictDefault(cfg).to_dict()
            check_complete(raw)
            written, _ = redacted(for_sharing(raw))  # Axolotl logs it
        if not resolve(cfg):
            return
        if written is not None:
            cfg[WRITTEN] = written
        from axolotl.core.builders import rl
        from axolotl.utils import config
        from axolotl.utils.data import rl as data

        from bdpo_plugin.hosts.axolotl import AxolotlBDPOConfig
        from bdpo_plugin.hosts.axolotl.loading import wrap_loading
        from bdpo_plugin.hosts.axolotl.model import wrap_model_config

        wrap_model_config(config)
        wrap_loading(data)
        wrap_evaluation()

        # Axolotl merges the plugins' training arguments once a process, at an import that a run
        # without us may have done before.
        if not hasattr(rl.AxolotlDPOConfig, "bdpo_alpha"):
            rl.AxolotlDPOConfig = AxolotlBDPOConfig

    def get_input_args(self) -> str:
        return "bdpo_plugin.hosts.axolotl.arguments.BDPOArgs"

    def get_training_args_mixin(self) -> str:
        return "bdpo_plugin.hosts.trl.config.BDPOArguments"

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        if not cfg.get(MARK):
            return None
        arguments = BDPOSettings.from_keys(cfg).to_keys()
        if cfg.group_by_length:  # which Axolotl itself honours in supervised fine-tuning only
            arguments["train_sampling_strategy"] = "group_by_length"
        if (cfg.overrides_of_model_config or {}).get("router_aux_loss_coef") == 0:
            arguments["router_aux_loss_coef"] = 0.0  # Axolotl hands TRL no value
        return arguments

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Raise BDPOError if the run would not come to our trainer."""
        if not cfg.get(MARK):
            return
        check_resolved(cfg)
        if not (cfg.merge_lora or is_evaluation()):
            check_trained(cfg)
        if cfg.seed is not None:
            set_seed(cfg.seed)  # Axolotl leaves the weights of a new adapter to chance
        if (other := PluginManager.get_instance().get_trainer_cls(cfg)) is not None:
            raise BDPOError(
                f"Another plugin brings its own trainer, {other.__name__}, which would take the "
                f"place of B-DPO's. Remove it from `plugins: {list(cfg.plugins)}`, or `rl: bdpo`."
            )

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Raise BDPOError if the trainer is not ours; nothing has been trained yet."""
        if not cfg.get(MARK):
            return
        from bdpo_plugin.hosts.axolotl import AxolotlBDPOTrainer

        if not isinstance(trainer, AxolotlBDPOTrainer):
            raise BDPOError(
                f"This run asked for B-DPO, but Axolotl made a {type(trainer).__name__}. "
                f"Nothing has been trained. Is `{PLUGIN}` the only plugin with a trainer?"
            )
        trainer.configuration = DictDefault(cfg.get(WRITTEN) or {}).to_dict() or None
        # Axolotl tells the datasets only to its own DPO trainer.
        paths = [dataset["path"] for dataset in cfg.datasets or []]
        trainer.dataset_tags = [path for path in paths if not Path(path).is_dir()]
