"""Short real runs of Axolotl's own command line on the tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import warm
import yaml
from real_runs import run_command

BASE: dict[str, Any] = {
    "plugins": ["bdpo_plugin.BDPOPlugin"],
    "rl": "bdpo",
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "sequence_len": 256,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "num_epochs": 1,
    "learning_rate": 1e-3,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "logging_steps": 1,
    "saves_per_epoch": 0,
    "save_strategy": "no",
    "seed": 0,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
}


def write_config(path: Path, tiny: Path, **changes: Any) -> Path:
    """A complete configuration; a change to None takes the key out."""
    data = {"ds_type": "json", "type": "chat_template.default", "split": "train"}
    config = {
        **BASE,
        "base_model": str(tiny / "model"),
        "datasets": [{"path": str(tiny / "train.jsonl"), **data}],
        "dataset_prepared_path": str(path.parent / "prepared"),
        "output_dir": str(path.parent / path.stem),
        **changes,
    }
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    return path


#: Axolotl's functions in a script. Its command line leaves the seed of a new adapter to chance.
SCRIPT = """
import sys
import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import train

cfg = load_cfg(sys.argv[1])
data = load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs())
torch.manual_seed(0)
train(cfg=cfg, dataset_meta=data)
"""

#: How many models are in memory when the trainer is made, from keys of a script with a tuple among
#: them, and with the file gone in which Axolotl keeps them.
MODELS = """
import gc
import os
import sys
import yaml
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedModel
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import setup_model_and_trainer

with open(sys.argv[1]) as file:
    keys = yaml.safe_load(file) | {"lora_target_modules": ("q_proj", "v_proj")}
cfg = load_cfg(DictDefault(keys))
data = load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs())
os.unlink(cfg.axolotl_config_path)
made = setup_model_and_trainer(cfg, data)
gc.collect()
heads = [o for o in gc.get_objects() if isinstance(o, PreTrainedModel) and hasattr(o, "lm_head")]
print(f"{len(heads)} models in memory")
print("recorded:", getattr(made[0], "configuration", None))
"""


#: What `axolotl train` imports before it reads data, and nothing of ours.
PRELOAD = ("axolotl.cli.main", "axolotl.cli.train", "axolotl.train", "axolotl.common.datasets")


def server() -> warm.Server:
    """Where the tests' runs of Axolotl are forked."""
    return warm.server(*PRELOAD)


def axolotl(*arguments: Any, cold: bool = False) -> subprocess.CompletedProcess:
    """Run Axolotl's command of this environment; its output is in `stdout`.

    It is a fork of :func:`server`, unless `cold`. What Axolotl launches itself is cold anyway:
    anything but `--launcher python`.
    """
    tool = Path(sys.executable).with_name("axolotl")
    return run_command([str(tool), *map(str, arguments)], {}, None if cold else server())


def script(config: Path, source: str = SCRIPT) -> subprocess.CompletedProcess:
    """The same from a Python script, warm."""
    return run_command([sys.executable, "-c", source, str(config)], {}, server())
