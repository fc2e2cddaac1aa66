"""One small run of plain TRL's trainer, and what a run leaves behind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from bdpo_plugin import BDPOConfig, BDPOTrainer
from bdpo_plugin.demo.tiny import build_model, build_tokenizer, preference_pairs, to_trl


def tiny_model(tokenizer: Any) -> Any:
    """Of hidden size 32; its mutual information is as large as a trained model's."""
    model = build_model(tokenizer, hidden_size=32, layers=2, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def small_trainer(
    folder: Path,
    *,
    adapter: str = "lora",
    pairs: int = 64,
    eval_pairs: int = 0,
    cls: type[BDPOTrainer] = BDPOTrainer,
    ref_model: Any = None,
    **options: Any,
) -> BDPOTrainer:
    """A trainer of the tiny model; its adapter is seeded, its scores are kept in `folder`.

    Args:
        adapter: ``lora`` or ``none``.
        ref_model: for a full fine-tune; default a second tiny model.
        options: further training arguments.
    """
    tokenizer = build_tokenizer()
    full = adapter == "none"
    defaults = {
        "output_dir": str(folder),
        "bdpo_cache_dir": str(folder / "cache"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "max_steps": 30,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,  # above the rounding of the gradients
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }
    data = {
        split: Dataset.from_list(to_trl(preference_pairs(count, split=split)))
        for split, count in (("train", pairs), ("eval", eval_pairs))
        if count
    }
    torch.manual_seed(0)
    return cls(
        tiny_model(tokenizer),
        (ref_model or tiny_model(tokenizer)) if full else None,
        args=BDPOConfig(**(defaults | options)),
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        peft_config=None if full else LoraConfig(r=4, target_modules="all-linear"),
    )


def last_checkpoint(folder: Path) -> Path | None:
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(found) if found else None


def scores(folder: Path) -> dict[str, list]:
    """The scores that a run saved, by column."""
    return pq.read_table(folder / "bdpo" / "reference_scores.parquet").to_pydict()


def stored_twice(cache: Path) -> int:
    """How many scores of a store are in it more than once. A damaged file raises."""
    keys = Counter(
        (file.parent, key)
        for file in cache.rglob("*.parquet")
        for key in pq.read_table(file, columns=["key"])["key"].to_pylist()
    )
    return sum(count > 1 for count in keys.values())


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The adapter or the model of a checkpoint."""
    adapter = checkpoint / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else checkpoint / "model.safetensors")


def steps(file: Path) -> list[dict[str, float]]:
    """What was logged, one entry a step, whoever ran it; a line cut off by a kill is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Over the tensors or lists of numbers of the same names.

    Raises:
        ValueError: names or sizes that differ.
    """
    if one.keys() != other.keys():
        raise ValueError(f"not the same names: {sorted(set(one) ^ set(other))}")
    largest = 0.0
    for name, values in one.items():
        a, b = (torch.as_tensor(v).double() for v in (values, other[name]))
        if a.shape != b.shape:
            raise ValueError(f"{name}: {tuple(a.shape)} beside {tuple(b.shape)}")
        largest = max(largest, float((a - b).abs().max()) if a.numel() else 0.0)
    return largest
