"""Reads from LLaMA-Factory's keys what determines the memory and the time of a run. Imports nothing
of LLaMA-Factory, as `bdpo recipes list` reads recipes of hosts that are not installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bdpo_plugin.inspection.plan import QUANTISED_BYTES, HostKeys, Plan, optimizer_bytes

KEYS = HostKeys(
    length="cutoff_len",
    rows="per_device_train_batch_size",
    accumulation="gradient_accumulation_steps",
    checkpointing="disable_gradient_checkpointing: false",
    quantised="quantization_bit: 4\nquantization_method: bnb",
    own_template="template: null  # the tokenizer's own",
    new_tokens="add_special_tokens: {}\nresize_vocab: true",
    no_thinking="enable_thinking: false",
    resized="resize_vocab: true",
)
_ATTENTION = {"fa2": "flash_attention_2", "disabled": "eager"}


def plan_of(keys: Mapping[str, Any]) -> Plan:
    """Returns the plan of a configuration, as its file has it or as LLaMA-Factory has read it."""
    kind = keys.get("finetuning_type", "lora")
    pure, half = keys.get("pure_bf16"), 4
    if pure or keys.get("bf16") or keys.get("fp16"):
        half = 2
    sharded = keys.get("deepspeed") is not None
    trained = half if pure or (sharded and kind == "full") else 4
    targets = keys.get("lora_target", "all")
    targets = targets.split(",") if isinstance(targets, str) else targets
    rows = keys.get("per_device_train_batch_size", 8)
    attention = keys.get("flash_attn")
    return Plan(
        model=str(keys["model_name_or_path"]),
        bytes_per_weight=trained
        if kind == "full"
        else QUANTISED_BYTES.get(keys.get("quantization_bit") or 0, half),
        trained_bytes=trained,
        computed_bytes=half,
        rank=keys.get("lora_rank", 8) if kind == "lora" else (0 if kind == "full" else None),
        targets=None if "all" in targets else [target.strip() for target in targets],
        rows=rows,
        max_length=keys.get("cutoff_len", 2048),
        checkpointing=not keys.get("disable_gradient_checkpointing"),
        optimizer_bytes=optimizer_bytes(keys.get("optim"), trained, deepspeed=sharded),
        pass_tokens=keys.get("bdpo_score_tokens"),
        batch=rows * keys.get("gradient_accumulation_steps", 1),
        sharded=sharded,
        attention=_ATTENTION.get(str(getattr(attention, "value", attention))),
    )
