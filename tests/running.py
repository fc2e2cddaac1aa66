"""Short real runs of TRL's trainers on the tiny model."""

from __future__ import annotations

import copy
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from bdpo_plugin import BDPOConfig, BDPOTrainer
from bdpo_plugin.demo.tiny import build_model, build_tokenizer, preference_pairs, to_trl

#: The four rows of the ablation table, by name.
ABLATIONS = {
    "B-DPO": {},
    "BW": {"bdpo_scaling": False},
    "SF": {"bdpo_balance": False},
    "DPO": {"bdpo_balance": False, "bdpo_scaling": False},
}


def pairs(count: int = 24, **options: Any) -> Dataset:
    return Dataset.from_list(to_trl(preference_pairs(count, **options)))


def sharp_model(tokenizer: Any = None, **options: Any) -> Any:
    """A random model whose mutual information is of the order of a trained one's."""
    model = build_model(tokenizer or build_tokenizer(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def trainer(
    cls: type = BDPOTrainer,
    output_dir: Any = "run",
    *,
    dataset: Any = None,
    evaluation: Any = None,
    model: Any = None,
    lora: LoraConfig | bool = True,
    ref_model: Any = None,
    tokenizer: Any = None,
    weigh: Any = None,
    config_class: Any = None,
    **options: Any,
) -> Any:
    tokenizer = tokenizer or build_tokenizer()
    model = model if model is not None else sharp_model(tokenizer)
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    config_class = config_class or (BDPOConfig if issubclass(cls, BDPOTrainer) else DPOConfig)
    config = config_class(**(defaults | options))
    if ref_model is None and not lora and cls is DPOTrainer:
        ref_model = copy.deepcopy(model)  # TRL would load it by a name that a random model lacks
    if lora is True:
        lora = LoraConfig(r=4, target_modules="all-linear")
    torch.manual_seed(0)
    return cls(
        model,
        ref_model,
        args=config,
        train_dataset=dataset if dataset is not None else pairs(),
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=lora or None,
        **({"weigh": weigh} if weigh else {}),
    )


def history(finished: Any, name: str) -> list[float]:
    """A logged metric over the steps."""
    return [entry[name] for entry in finished.state.log_history if name in entry]


def weights(finished: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in finished.model.named_parameters()}


def scores(output_dir: Any, file: str = "reference_scores.parquet") -> dict[str, list]:
    return pq.read_table(f"{output_dir}/bdpo/{file}").to_pydict()
