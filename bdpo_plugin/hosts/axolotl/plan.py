"""Reads from Axolotl's keys what determines the memory and the time of a run. Imports nothing of
Axolotl, as `bdpo recipes list` reads recipes of hosts that are not installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bdpo_plugin.inspection.plan import QUANTISED_BYTES, HostKeys, Plan, optimizer_bytes

KEYS = HostKeys(
    length="sequence_len",
    rows="micro_batch_size",
    accumulation="gradient_accumulation_steps",
    checkpointing="gradient_checkpointing: true",
    quantised="adapter: qlora\nload_in_4bit: true",
    own_template="chat_template: tokenizer_default",
    new_tokens="tokens: [{}]\nlora_modules_to_save: [embed_tokens, lm_head]",
    no_thinking="bdpo recipes show axolotl/qwen3-0.6b  # copy its chat_template_jinja",
)
_QUANTISED = {"load_in_4bit": QUANTISED_BYTES[4], "load_in_8bit": QUANTISED_BYTES[8]}


def plan_of(keys: Mapping[str, Any]) -> Plan:
    """Returns the plan of a configuration, as its file has it or as Axolotl has validated it.

    `bf16: auto` counts as true where Axolotl has not yet looked at the machine."""
    adapter = keys.get("adapter")
    lora = adapter in ("lora", "qlora")
    targets = keys.get("lora_target_modules")
    half = 2 if keys.get("bf16") or keys.get("fp16") else 4
    if (dtype := keys.get("torch_dtype")) is not None:
        half = 4 if str(dtype).endswith("float32") else 2
    trained = 4 if adapter else half
    deepspeed = keys.get("deepspeed") is not None
    return Plan(
        model=str(keys["base_model"]),
        bytes_per_weight=next((size for key, size in _QUANTISED.items() if keys.get(key)), half),
        trained_bytes=trained,
        computed_bytes=half,
        rank=keys["lora_r"] if lora else (None if adapter else 0),
        targets=None
        if keys.get("lora_target_linear") or not isinstance(targets, list)
        else targets,
        rows=keys.get("micro_batch_size") or 1,
        max_length=keys.get("sequence_len") or 512,
        checkpointing=bool(keys.get("gradient_checkpointing")),
        optimizer_bytes=optimizer_bytes(keys.get("optimizer"), trained, deepspeed=deepspeed),
        pass_tokens=keys.get("bdpo_score_tokens"),
        batch=(keys.get("micro_batch_size") or 1) * (keys.get("gradient_accumulation_steps") or 1),
        sharded=deepspeed or bool(keys.get("fsdp_config") or keys.get("fsdp")),
        attention=keys.get("attn_implementation"),
    )
