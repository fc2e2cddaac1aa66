"""Reads from the keys of `bdpo train` what determines the memory and the time of a run. Imports
nothing of TRL, as `bdpo recipes list` reads recipes of hosts that are not installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bdpo_plugin.inspection.plan import QUANTISED_BYTES, HostKeys, Plan, optimizer_bytes

KEYS = HostKeys(
    length="max_length",
    rows="per_device_train_batch_size",
    accumulation="gradient_accumulation_steps",
    checkpointing="gradient_checkpointing: true",
    quantised="use_peft: true\nload_in_4bit: true",
    own_template="Save the chat template that the model was trained with beside its tokenizer",
    new_tokens="Add {} to the tokenizer and embeddings to the model, and save both in one folder",
    no_thinking='Give each row a column `chat_template_kwargs` with {"enable_thinking": false}',
    resized="Name a folder whose model has an embedding for each token of its tokenizer",
)


def plan_of(keys: Mapping[str, Any]) -> Plan:
    """Returns the plan of a configuration, with TRL's defaults for what it leaves out."""
    whole = not keys.get("use_peft")
    trained = 2 if keys.get("dtype") in ("bfloat16", "float16") else 4
    computed = 2 if keys.get("fp16") or keys.get("bf16", True) else 4
    bits = 4 if keys.get("load_in_4bit") else 8 if keys.get("load_in_8bit") else None
    deepspeed = keys.get("deepspeed") is not None
    targets = keys.get("lora_target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    rows = keys.get("per_device_train_batch_size", 8)
    return Plan(
        model=str(keys["model_name_or_path"]),
        bytes_per_weight=trained if whole or bits is None else QUANTISED_BYTES[bits],
        trained_bytes=trained,
        computed_bytes=computed,
        rank=0 if whole else keys.get("lora_r", 16),
        targets=None if targets is None or "all-linear" in targets else targets,
        rows=rows,
        max_length=keys.get("max_length", 1024),
        checkpointing=keys.get("gradient_checkpointing", True),
        optimizer_bytes=optimizer_bytes(keys.get("optim"), trained, deepspeed=deepspeed),
        pass_tokens=keys.get("bdpo_score_tokens"),
        batch=rows * keys.get("gradient_accumulation_steps", 1),
        sharded=deepspeed or bool(keys.get("fsdp")),
        attention=keys.get("attn_implementation"),
    )
