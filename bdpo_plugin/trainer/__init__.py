"""B-DPO for TRL: :class:`BDPOConfig` and :class:`BDPOTrainer`."""

from bdpo_plugin.trainer.config import BDPOArguments, BDPOConfig
from bdpo_plugin.trainer.trainer import BDPOTrainer

__all__ = ["BDPOArguments", "BDPOConfig", "BDPOTrainer"]
