"""One run in a process of its own, so that its peak memory is its own.

Called by :mod:`benchmarks.runs` with a JSON job and the file to write the JSON result to.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from benchmarks.material import build_tokenizer, load_model, load_pairs, write
from benchmarks.setting import Setting


def prepare(setting: Setting, folder: Path) -> dict[str, Any]:
    """Writes what the runs share; returns the description of the machine."""
    write(setting, folder)
    packages = ("bdpo-plugin", "torch", "transformers", "trl", "peft", "axolotl", "bitsandbytes")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
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
) -> dict[str, Any]:
    """One epoch, or the precomputation alone, of the host's trainer or of ours.

    Args:
        method: ``dpo`` or ``bdpo``.
        options: further training arguments.

    Returns:
        times in seconds and memory in MiB: ``wall_s`` from the making of the trainer to the end
        of training, in it ``pass_s`` and ``step_s``; ``peak_mib``, and ``peak_over_load_mib``
        beyond what model and data take.
    """
    trainer_class, config_class = _classes(setting.host, method)
    data = load_pairs(folder)
    tokenizer = build_tokenizer(setting.vocabulary)
    model = load_model(setting, folder)
    if setting.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # leaves flash, and what takes a mask
    load = os.getloadavg()[0]
    memory = _Memory(setting.device)
    clock = _Clock(setting.device)
    start, start_cpu = clock.now(), time.process_time()
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
    result = {"load": load, "pass_s": clock.in_pass, "prepare_s": clock.now() - start}
    result["pass_peak_over_load_mib"] = memory.peak() - memory.loaded
    if train:
        loss = trainer.train().training_loss
        rows = trainer.train_dataset
        tokens = sum(
            2 * len(p) + len(c) + len(r)
            for p, c, r in zip(
                rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True
            )
        )
        wall, train_s = clock.now() - start, clock.ended - clock.began
        result |= {
            "wall_s": wall,
            "cpu_s": time.process_time() - start_cpu,
            "train_s": train_s,
            "step_s": train_s / trainer.state.global_step,
            "steps": trainer.state.global_step,
            "tokens": tokens,
            "tokens_per_s": tokens / wall,
            "loss": loss,
        }
    peak = memory.peak()
    return result | {"peak_mib": peak, "peak_over_load_mib": peak - memory.loaded}


def _classes(host: str, method: str) -> tuple[type, type]:
    if host == "axolotl" and method == "dpo":
        from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
        from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

        return AxolotlDPOTrainer, AxolotlDPOConfig
    if host == "axolotl":
        from bdpo_plugin.hosts.axolotl import AxolotlBDPOConfig, AxolotlBDPOTrainer

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


class _Clock(TrainerCallback):
    """Times, with the device waited for, of the pass and of the training's begin and end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.in_pass = self.began = self.ended = 0.0

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.now()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.ended = self.now()


def _timed(trainer_class: type, clock: _Clock) -> type:
    class Timed(trainer_class):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            start = clock.now()
            scored = super()._precompute_ref_logps(*args, **kwargs)
            clock.in_pass += clock.now() - start
            return scored

    Timed.__name__ = trainer_class.__name__
    return Timed


class _Memory:
    """In MiB, of the device; on the CPU the resident set of this process."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.loaded = torch.cuda.memory_allocated() / 2**20
        else:
            self.loaded = psutil.Process().memory_info().rss / 2**20

    def peak(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        if (status := Path("/proc/self/status")).exists():
            # getrusage's is that of the parent, if that was larger when it started this process
            line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) / 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    setting, folder = Setting(**job.pop("setting")), Path(job.pop("folder"))
    result = run(setting, folder, **job) if job else prepare(setting, folder)
    output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
