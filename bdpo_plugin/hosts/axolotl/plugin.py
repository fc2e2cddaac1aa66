"""The plugin class that Axolotl's plugin manager loads."""

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
    """Adds `rl: bdpo` to Axolotl. Without that key in a configuration, its hooks do nothing.

    It keeps no state, as one process may hold several configurations, with and without B-DPO.
    """

    def register(self, cfg: DictDefault) -> None:
        """Rewrites a raw B-DPO configuration, see :func:`~.rewrite_config.resolve`."""
        written = None
        if cfg.get("rl") == "bdpo":
            raw = DictDefault(cfg).to_dict()
            check_complete(raw)
            written, _ = redacted(for_sharing(raw))  # Axolotl logs all keys
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

        # Axolotl merges the plugins' training arguments once per process, on an import that may
        # have happened in an earlier run without this plugin.
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
        if cfg.group_by_length:  # Axolotl itself honours it in supervised fine-tuning only
            arguments["train_sampling_strategy"] = "group_by_length"
        if (cfg.overrides_of_model_config or {}).get("router_aux_loss_coef") == 0:
            arguments["router_aux_loss_coef"] = 0.0  # Axolotl does not pass the value to TRL
        return arguments

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Raises BDPOError if the run would not use our trainer."""
        if not cfg.get(MARK):
            return
        check_resolved(cfg)
        if not (cfg.merge_lora or is_evaluation()):
            check_trained(cfg)
        if cfg.seed is not None:
            set_seed(cfg.seed)  # Axolotl does not seed the initialization of a new adapter
        if (other := PluginManager.get_instance().get_trainer_cls(cfg)) is not None:
            raise BDPOError(
                f"Another plugin brings its own trainer, {other.__name__}, which would take the "
                f"place of B-DPO's. Remove it from `plugins: {list(cfg.plugins)}`, or `rl: bdpo`."
            )

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Raises BDPOError if the trainer is not ours. Nothing has been trained by then."""
        if not cfg.get(MARK):
            return
        from bdpo_plugin.hosts.axolotl import AxolotlBDPOTrainer

        if not isinstance(trainer, AxolotlBDPOTrainer):
            raise BDPOError(
                f"This run asked for B-DPO, but Axolotl made a {type(trainer).__name__}. "
                f"Nothing has been trained. Is `{PLUGIN}` the only plugin with a trainer?"
            )
        trainer.configuration = DictDefault(cfg.get(WRITTEN) or {}).to_dict() or None
        # Axolotl passes the names of the datasets only to its own DPO trainer.
        paths = [dataset["path"] for dataset in cfg.datasets or []]
        trainer.dataset_tags = [path for path in paths if not Path(path).is_dir()]
