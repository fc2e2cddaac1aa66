"""B-DPO for TRL: :class:`BDPOConfig` and :class:`BDPOTrainer`."""

from bdpo_plugin.hosts.trl.config import BDPOArguments, BDPOConfig
from bdpo_plugin.hosts.trl.trainer import BDPOTrainer

__all__ = ["BDPOArguments", "BDPOConfig", "BDPOTrainer"]
