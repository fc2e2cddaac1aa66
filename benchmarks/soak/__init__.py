"""Runs that are killed, spread over processes, or go on for long, and what came of them.

Each module is a command, `python -m benchmarks.soak.NAME`; docs/reliability.md has the figures.
"""

import os

# Before torch is loaded: on tiny models threads only wait for each other.
os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
