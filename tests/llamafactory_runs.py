"""Short real runs of LLaMA-Factory on the tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import warm
import yaml
from real_runs import run_command

BASE: dict[str, Any] = {
    "stage": "dpo",
    "pref_loss": "bdpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "all",
    "dataset": "train",
    "template": "chatml",
    "cutoff_len": 256,
    "preprocessing_num_workers": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 0,
    "use_cpu": True,
}


def config(tiny: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A complete configuration; a change to None takes the key out."""
    merged = {
        **BASE,
        "model_name_or_path": str(tiny / "model"),
        "dataset_dir": str(tiny),
        "output_dir": str(output_dir),
        **changes,
    }
    return {key: value for key, value in merged.items() if value is not None}


def cli(*arguments: Any, cold: bool = False, **environment: str) -> str:
    """The output of `llamafactory-cli` of this environment.

    It is a fork of a process that has imported LLaMA-Factory, unless `cold` or with a change of
    the environment, which may be read at import.
    """
    tool = Path(sys.executable).with_name("llamafactory-cli")
    server = None if cold or environment else warm.server("llamafactory.train.tuner")
    return run_command([str(tool), *map(str, arguments)], environment, server).stdout


def train(
    tiny: Path,
    output_dir: Path,
    *,
    environment: dict[str, str] | None = None,
    cold: bool = False,
    **changes: Any,
) -> str:
    """A run of the command line, from its YAML; its output."""
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config(tiny, output_dir, **changes)))
    return cli("train", path, cold=cold, **(environment or {}))


def run(tiny: Path, output_dir: Path, **changes: Any) -> Path:
    """The same in this process, which is much quicker."""
    from llamafactory.train.tuner import run_exp

    run_exp(config(tiny, output_dir, **changes))
    return output_dir


def log(output_dir: Path) -> list[dict[str, Any]]:
    """What was logged in each step."""
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def curve(output_dir: Path, name: str) -> list[float]:
    """A logged metric over the steps."""
    return [entry[name] for entry in log(output_dir) if name in entry]


def scores(output_dir: Path, file: str = "reference_scores.parquet") -> dict[str, list]:
    """The scores that a run saved, by column."""
    return pq.read_table(output_dir / "bdpo" / file).to_pydict()
