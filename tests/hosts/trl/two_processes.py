"""What each process of test_two_processes.py runs: python two_processes.py OUTPUT_DIR [axolotl]."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch.distributed as dist
from running import pairs, trainer

from bdpo_plugin import BDPOTrainer


def main(output_dir: str, host: str = "") -> None:
    cls, config_class = BDPOTrainer, None
    if host == "axolotl":
        from bdpo_plugin.hosts.axolotl import AxolotlBDPOConfig, AxolotlBDPOTrainer

        cls, config_class = AxolotlBDPOTrainer, AxolotlBDPOConfig
    rows = pairs(25).to_list()
    rows[7]["rejected"] = rows[7]["chosen"]
    dataset = type(pairs()).from_list(rows)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    made = trainer(
        cls,
        output_dir,
        config_class=config_class,
        dataset=dataset,
        evaluation=pairs(5, seed=1),
        per_device_train_batch_size=8 // processes,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=4,
        bdpo_score_tokens=400,
        bdpo_cache_dir=f"{output_dir}/cache",
        ddp_find_unused_parameters=False,
    )
    made.train()
    if dist.is_initialized():
        # gloo may wait for ever when the process groups of exiting processes are torn down
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
