"""Writes the record of a run to its output folder, so that others can repeat the run.

Also ends a run after its first steps, for `bdpo recipes check --run`, which compares two runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from transformers import TrainerCallback

from bdpo_plugin.output.tables import print_warning
from bdpo_plugin.output.weighing_record import active_settings
from bdpo_plugin.redact import configuration_text, digest_of
from bdpo_plugin.settings import BDPOError

#: Names of files in the folder ``bdpo`` of an output folder.
RECORD = "run.json"
CONFIGURATION = "recipe.yml"
#: Environment variable with the number of steps after which a run ends. Only its log is saved.
FIRST_STEPS = "BDPO_FIRST_STEPS"
#: Environment variable with the output folder of the run that :data:`FIRST_STEPS` is meant for. It
#: is set by `bdpo recipes check --run`.
FIRST_STEPS_IN = "BDPO_FIRST_STEPS_IN"
#: File in the folder ``bdpo`` with the number of steps that such a run has done.
STEP = "step.txt"

_PACKAGES = (
    *("bdpo-plugin", "axolotl", "llamafactory", "trl", "transformers", "peft", "accelerate"),
    *("datasets", "torch", "bitsandbytes", "deepspeed", "flash-attn"),
)


def write_record(
    trainer: Any, finished: Mapping[str, float] | None = None, *, resumed: bool = False
) -> None:
    """Writes ``bdpo/run.json`` and, if the configuration is known, ``bdpo/recipe.yml``.

    Args:
        trainer: a :class:`~bdpo_plugin.training.trainer_mixin.RunMixin` whose data is ready.
        resumed: whether training resumed from a checkpoint. The logged time is then only that of
            the last part of the run, and is not recorded.
    """
    folder = Path(trainer.args.output_dir, "bdpo")
    folder.mkdir(parents=True, exist_ok=True)
    record = _record(trainer)
    if finished is not None:  # not every run of a host saves its last log to a file
        kept = ("train_peak_memory_gib",) if resumed else ("train_runtime", "train_peak_memory_gib")
        record |= {name: finished[name] for name in kept if name in finished}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / RECORD).write_text(f"{text}\n", encoding="utf-8")
    recipe = folder / CONFIGURATION
    if trainer.configuration is not None:
        recipe.write_text(configuration_text(trainer.configuration), encoding="utf-8")
    else:
        recipe.unlink(missing_ok=True)  # an earlier run in this folder may have written one


def _record(trainer: Any) -> dict[str, Any]:
    args, scorer = trainer.args, trainer.scorer
    model = trainer.accelerator.unwrap_model(trainer.model)
    description = trainer._description()
    one = args.per_device_train_batch_size * max(1, args.n_gpu)
    null_prompt = scorer.null_prompt
    template = getattr(trainer._tokenizer, "chat_template", None)
    device = args.device
    on_gpu = device.type == "cuda"
    quantised = getattr(model.config, "quantization_config", None)
    return {
        "host": trainer.host,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "settings": active_settings(scorer.settings, weigh=scorer.weigh is not None),
        "weigh": description["weigh"],
        "pair_loss": description["pair_loss"],
        "control": scorer.settings.control,
        "loss": description["loss"],
        "rows": description.get("training pairs"),
        "scores": scorer.scores_record(),
        "pairs": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "null_prompt": {"text": null_prompt.text, "source": null_prompt.source},
        "chat_template": template and digest_of(str(template)),
        "batch": {
            "of_each_process": one,
            "accumulation": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "effective": one * args.gradient_accumulation_steps * args.world_size,
        },
        "hardware": torch.cuda.get_device_name(device) if on_gpu else device.type.upper(),
        "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "quantised": quantised is not None,
        "quantization": quantised and _quantization(quantised),
        "attention": getattr(model.config, "_attn_implementation", None),
        "layout": {use: layout._asdict() for use, layout in scorer.reader.layouts.items()},
        "model_commit": getattr(model.config, "_commit_hash", None),
        "versions": {"python": python_version(), **_versions()},
    }


def _quantization(config: Any) -> dict[str, Any]:
    """Returns the quantization settings as JSON values, enough to quantize the weights again."""
    settings = config if isinstance(config, dict) else config.to_dict()
    known = {key: value for key, value in settings.items() if not key.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(known, default=str))
    return plain


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def first_steps() -> int | None:
    """Returns the number of steps in the environment variable :data:`FIRST_STEPS`, if it is set.

    Raises:
        BDPOError: it is not a whole number above 0.
    """
    value = os.environ.get(FIRST_STEPS)
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise BDPOError(f"`{FIRST_STEPS}={value}` cannot be used: it must be a whole number >= 1.")
    return int(value)


class FirstSteps(TrainerCallback):
    """Ends the process after the first steps of a run. Its schedule stays that of the whole run.

    Only the log is saved, as ``trainer_state.json`` in the output folder. Evaluation stays on, as
    it uses the same random number generator as dropout. The process ends with status 0 if
    :data:`FIRST_STEPS_IN` names the output folder. Otherwise it ends with status 1 and a message,
    as the variable may have been left in a user's shell by mistake.
    """

    def __init__(self, steps: int, output_dir: str) -> None:
        self._steps = steps
        self._wanted = os.environ.get(FIRST_STEPS_IN) == output_dir

    def _told(self, ends: str) -> str:
        return (
            f"`{FIRST_STEPS}={self._steps}` is set in the environment: this run {ends} after "
            f"{self._steps} steps, and no model is saved. For a whole run: `unset {FIRST_STEPS}`."
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and not self._wanted:
            print_warning(self._told("will end"))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = False
        if self._wanted and state.is_world_process_zero:
            Path(args.output_dir, "bdpo", STEP).write_text(str(state.global_step))
        if state.global_step >= self._steps:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            state.save_to_json(str(Path(args.output_dir, "trainer_state.json")))
        # Exiting here skips everything that hosts do with a finished model.
        if self._wanted:
            raise SystemExit(0)
        raise SystemExit(self._told("has ended") if state.is_world_process_zero else 1)


def add_peak_memory(logs: dict[str, float], device: torch.device) -> None:
    """Adds ``train_peak_memory_gib`` to the last log of a run, in place.

    It is the peak memory of this process, including the reference pass: memory allocated on its
    GPU, or resident memory on a CPU."""
    if "train_runtime" not in logs:
        return
    if device.type == "cpu":
        try:
            import resource
        except ImportError:  # Windows
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    elif read := getattr(torch.get_device_module(device), "max_memory_allocated", None):
        peak = read(device)
    else:
        return
    logs["train_peak_memory_gib"] = round(peak / 2**30, 3)
