"""One epoch through LLaMA-Factory's own `run_exp`, as its command line runs it."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from benchmarks.material import build_tokenizer
from benchmarks.meters import Clock, Memory
from benchmarks.setting import Setting


def write(setting: Setting, folder: Path) -> None:
    """The tokenizer, and the entry of LLaMA-Factory's list of datasets."""
    build_tokenizer(setting.vocabulary).save_pretrained(folder)
    columns = {name: name for name in ("prompt", "chosen", "rejected")}
    entry = {"file_name": "pairs.json", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": entry}))


def run(
    setting: Setting, folder: Path, method: str, options: dict[str, Any], clock: Clock
) -> tuple[float, Memory]:
    """Trains; the time at which the model had been loaded, and the memory from then on."""
    from llamafactory.train.dpo import workflow
    from llamafactory.train.tuner import run_exp

    loaded: list[Any] = []

    def load_model(*args: Any, **kwargs: Any) -> Any:
        model = theirs(*args, **kwargs)
        if not loaded:  # not the reference, which is loaded next
            loaded.extend([clock.start(), Memory(setting.device)])
        return model

    theirs, workflow.load_model = workflow.load_model, load_model
    run_exp(_arguments(setting, folder, method) | options, callbacks=[clock])
    if method == "bdpo":  # its pass is at the end of the trainer's making
        clock.in_pass = clock.began - clock.initialised
    return tuple(loaded)


def _arguments(setting: Setting, folder: Path, method: str) -> dict[str, Any]:
    return {
        "stage": "dpo",
        "do_train": True,
        "pref_loss": "bdpo" if method == "bdpo" else "sigmoid",
        "model_name_or_path": str(folder),
        "dataset_dir": str(folder),
        "dataset": "pairs",
        "template": "empty",
        "cutoff_len": setting.prompt + setting.longest + 8,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "output_dir": mkdtemp(dir=folder),
        "finetuning_type": "full" if setting.adapter == "none" else "lora",
        "lora_rank": setting.rank,
        "lora_target": "all",
        "flash_attn": setting.attention,
        "disable_gradient_checkpointing": not setting.gradient_checkpointing,
        "use_cpu": setting.device == "cpu",
        "bf16": setting.dtype == "bfloat16",
        "per_device_train_batch_size": setting.batch,
        "num_train_epochs": 1,
        "seed": setting.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": setting.device == "cuda",
        **({"quantization_bit": 4} if setting.adapter == "qlora" else {}),
    }
