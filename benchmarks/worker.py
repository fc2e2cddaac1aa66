"""One run in a process of its own, so that its peak memory is its own.

Called by :mod:`benchmarks.runs` with a JSON job and the file to write the JSON result to.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from peft import LoraConfig

import bdpo_plugin
from benchmarks import llamafactory
from benchmarks.material import build_tokenizer, count_tokens, load_model, load_pairs, write
from benchmarks.meters import Clock, Memory, Parts, calls_per_step
from benchmarks.setting import FORWARDS, HOST_PART, HOSTS, Setting

PACKAGES = ("bdpo-plugin", "torch", "transformers", "trl", "peft", "bitsandbytes", *HOSTS)

#: Where the functions are whose time is measured.
_RUN, _REFERENCE = "bdpo_plugin.training", "bdpo_plugin.reference"


def prepare(setting: Setting, folder: Path) -> dict[str, Any]:
    """Writes what the runs share; returns the description of the machine."""
    write(setting, folder)
    if setting.host == "llamafactory":
        llamafactory.write(setting, folder)
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package == "bdpo-plugin":
                found[package] = f"{bdpo_plugin.__version__} (its source, not installed)"
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": found,
    }


def run(
    setting: Setting,
    folder: Path,
    method: str,
    options: dict[str, Any],
    train: bool,
    profiled: int = 0,
) -> dict[str, Any]:
    """Training, one epoch if `options` do not say more, or the precomputation alone.

    Args:
        method: of the host's trainer, ``dpo``, or of ours: ``bdpo``, or ``bdpo-collecting``, with
            the garbage collection of Axolotl's trainer after each step.
        options: further training arguments.
        profiled: steps that are run once more after all else, under the profiler; of TRL's
            trainers alone.

    Returns:
        times in seconds and memory in MiB: ``wall_s`` from the making of the trainer to the end
        of training, in it ``pass_s`` and ``step_s``, and ``warm_step_s`` without the first steps;
        ``peak_mib``, and ``peak_over_load_mib`` beyond what model and data take; ``calls``, see
        :func:`~benchmarks.meters.calls_per_step`.
    """
    clock, load = Clock(setting.device), os.getloadavg()[0]
    if setting.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # leaves flash, and what takes a mask
    trainer = None
    if setting.host == "llamafactory":
        start, memory = llamafactory.run(setting, folder, method, options, clock)
    else:
        start, memory, trainer = _run_trl(setting, folder, method, options, train, clock)
    result = {"load": load, "pass_s": clock.in_pass}
    if train:
        wall = clock.ended - start
        tokens = count_tokens(folder) * options.get("num_train_epochs", 1)
        result |= {
            "wall_s": wall,
            "cpu_s": clock.cpu_ended - clock.cpu_started,
            "train_s": clock.ended - clock.began,
            "step_s": (clock.ended - clock.began) / clock.steps,
            "warm_step_s": clock.warm_step(),
            "steps": clock.steps,
            "tokens": tokens,
            "tokens_per_s": tokens / wall,
        }
    peak = memory.peak()
    result |= {"peak_mib": peak, "peak_over_load_mib": peak - memory.loaded}
    if profiled and trainer:
        try:
            result["calls"] = calls_per_step(trainer, profiled)
        except Exception as error:  # what was measured is not lost for it
            result["calls_error"] = f"{type(error).__name__}: {error}"[:300]
    return result


def run_parts(
    setting: Setting, folder: Path, options: dict[str, Any], until_forward: bool
) -> dict[str, list[float]]:
    """Of a run of ours without its training, what its parts took: by title, wall and processor
    time in seconds, the latter with that of ended processes.

    Args:
        options: further training arguments.
        until_forward: end it before the first forward of the reference.
    """

    class Ended(Exception):
        pass

    clock = Clock(setting.device)
    parts = Parts(lambda: np.array([clock.now(), sum(os.times()[:4])]), _parts_of(setting.host))
    first = f"{_REFERENCE}.score_pairs.score_requests"
    end = patch(first, side_effect=Ended) if until_forward else nullcontext()
    with parts, end, suppress(Ended):
        run(setting, folder, "bdpo", options, train=False)
    return {title: took.tolist() for title, took in parts.took.items()}


def _parts_of(host: str) -> dict[str, list[str]]:
    """By title, the functions whose time is a part of a run of ours."""
    if host == "llamafactory":
        theirs = "llamafactory.train.dpo.workflow:get_dataset"
        trainer, checked = "bdpo_plugin.hosts.llamafactory.trainer", {}
    else:
        theirs = "trl.trainer.dpo_trainer:DPOTrainer._prepare_dataset"
        trainer = "bdpo_plugin.hosts.trl.trainer"
        checked = {
            "rows checked": [f"{trainer}:check_datasets"],
            "prompts checked": [f"{trainer}:prompt_boundary_mismatches"],
        }
    tables = ("print_settings", "print_scores", "save_scores")
    return {
        HOST_PART: [theirs],
        **checked,
        "token ids read": [f"{trainer}:dataset_pairs"],
        "pairs checked": [f"{_RUN}.datasets:check_pairs", f"{_RUN}.scorer:check_room"],
        "null prompt": [f"{_RUN}.scorer:find_null_prompt"],
        "fingerprints": [f"{_RUN}.scorer:identify"],
        "scores wanted": [f"{_REFERENCE}.score_pairs:required_scores"],
        "scores looked up": [f"{_REFERENCE}.score_pairs:Exchange"],
        "batches made": [f"{_REFERENCE}.score_pairs:budgeted_batches"],
        "probe of the model": ["bdpo_plugin.model.reader:probe"],
        FORWARDS: [f"{_REFERENCE}.score_pairs:_compute"],
        "scores written": [f"{_REFERENCE}.shared_store:Exchange.write"],
        "tables": [f"{_RUN}.scorer:{name}" for name in tables],
        "the rest": [f"{_RUN}.trainer_mixin:RunMixin._prepared"],
    }


def _run_trl(
    setting: Setting,
    folder: Path,
    method: str,
    options: dict[str, Any],
    train: bool,
    clock: Clock,
) -> tuple[float, Memory, Any]:
    """The time at which the model had been loaded, the memory from then on, and the trainer."""
    trainer_class, config_class = _classes(setting.host, method)
    data = load_pairs(folder)
    tokenizer = build_tokenizer(setting.vocabulary)
    model = load_model(setting, folder)
    memory = Memory(setting.device)
    start = clock.start()
    trainer = _timed(trainer_class, clock)(
        model,
        # Axolotl loads the reference of a full fine-tune itself, TRL's trainer by the model's name
        load_model(setting, folder)
        if (setting.host, setting.adapter) == ("axolotl", "none")
        else None,
        args=config_class(**_arguments(setting) | options),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=None
        if setting.adapter == "none"
        else LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear"),
    )
    trainer.add_callback(clock)
    if train:
        trainer.train()
    return start, memory, trainer


def _classes(host: str, method: str) -> tuple[type, type]:
    if host == "axolotl" and method == "dpo":
        from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
        from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

        return AxolotlDPOTrainer, AxolotlDPOConfig
    if host == "axolotl":
        from bdpo_plugin.hosts.axolotl import AxolotlBDPOConfig, AxolotlBDPOTrainer

        if method == "bdpo-collecting":
            from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

            class Collecting(AxolotlBDPOTrainer):
                training_step = AxolotlDPOTrainer.training_step

            return Collecting, AxolotlBDPOConfig
        return AxolotlBDPOTrainer, AxolotlBDPOConfig
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig
    from bdpo_plugin import BDPOConfig, BDPOTrainer

    return BDPOTrainer, BDPOConfig


def _arguments(setting: Setting) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": setting.device == "cpu",
        "bf16": setting.dtype == "bfloat16",
        "gradient_checkpointing": setting.gradient_checkpointing,
        "per_device_train_batch_size": setting.batch,
        "max_length": setting.prompt + setting.longest,
        "num_train_epochs": 1,
        "seed": setting.seed,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": setting.device == "cuda",
    }


def _timed(trainer_class: type, clock: Clock) -> type:
    class Timed(trainer_class):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            start = clock.now()
            scored = super()._precompute_ref_logps(*args, **kwargs)
            clock.in_pass += clock.now() - start
            return scored

    Timed.__name__ = trainer_class.__name__
    return Timed


def main() -> None:
    job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    setting, folder = Setting(**job.pop("setting")), Path(job.pop("folder"))
    if "until_forward" in job:
        result = run_parts(setting, folder, **job)
    else:
        result = run(setting, folder, **job) if job else prepare(setting, folder)
    output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
