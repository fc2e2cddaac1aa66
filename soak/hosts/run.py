"""One run of a host in this process: ``python run.py HOST CONFIG RESULT``.

It is what the host's command line does. The result is a JSON file: ``log``, the log history, or
``refused``, the error that ended the run.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def axolotl(config: Path) -> list[dict[str, Any]]:
    """As `axolotl train`, which leaves the seed of a new adapter to chance."""
    import torch
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import train

    cfg = load_cfg(str(config))
    data = load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    torch.manual_seed(0)
    *_, trainer = train(cfg=cfg, dataset_meta=data)
    return trainer.state.log_history


def llamafactory(config: Path) -> list[dict[str, Any]]:
    """As `llamafactory-cli train`."""
    import yaml
    from llamafactory.train.tuner import run_exp

    keys = yaml.safe_load(config.read_text())
    run_exp(keys)
    return json.loads(Path(keys["output_dir"], "trainer_state.json").read_text())["log_history"]


#: By name; and what a process that runs many imports first.
HOSTS: dict[str, tuple[Callable[[Path], list[dict[str, Any]]], tuple[str, ...]]] = {
    "axolotl": (
        axolotl,
        # not axolotl.core, which takes in what the plugins of a run add when it is imported
        (
            *("axolotl.cli.args", "axolotl.cli.config", "axolotl.common.datasets"),
            *("axolotl.train", "trackio", "wandb", "trl.trainer.dpo_trainer"),
            *("trl.experimental.cpo", "trl.experimental.orpo", "trl.experimental.prm"),
            *("trl.trainer.kto_trainer", "trl.trainer.reward_trainer"),
        ),
    ),
    "llamafactory": (llamafactory, ("llamafactory.train.tuner", "llamafactory.train.dpo.workflow")),
}


def make_liger_interpretable() -> None:
    """Give Liger's kernels the functions of CUDA's libdevice that Triton's interpreter lacks."""
    import triton.language as tl
    from liger_kernel import ops

    for name in ("cross_entropy", "geglu", "layer_norm", "rms_norm"):
        module = sys.modules[f"{ops.__name__}.{name}"]
        for function, replacement in (
            ("rsqrt", lambda x: tl.math.rsqrt(x)),
            ("tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1),
        ):
            if hasattr(module, function):
                setattr(module, function, replacement)


def main(host: str, config: str, result: str) -> None:
    run, _ = HOSTS[host]
    gc.freeze()  # Axolotl collects garbage at every step: not what was imported, which takes long
    if "liger" in Path(config).read_text():
        make_liger_interpretable()
    try:
        found: dict[str, Any] = {"log": run(Path(config))}
    except BaseException as error:  # to be compared with how the other run ended
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            raise
        found = {"refused": f"{type(error).__name__}: {error}"}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
