"""The table of Axolotl's options that B-DPO cannot honour, and the checks of it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from bdpo_plugin.limits import OFF, Limit, check_limits
from bdpo_plugin.settings import BDPOError, BDPOSettings

TRAINER = "bdpo_plugin.hosts.axolotl.AxolotlBDPOTrainer"

_TEXT = "B-DPO has no mutual information for images: text datasets only"
_WHOLE = "the reference pass needs whole sequences in each rank"
_ONE = (1, "1", *OFF)
_DROPPED = "has no effect"

#: Options that B-DPO cannot honour, and options that Axolotl silently drops under `rl: dpo`.
LIMITS = (
    Limit("dpo_use_weighting", "its own weights on the pairs would multiply B-DPO's"),
    Limit("dpo_use_liger_kernel", "the fused loss leaves no place for the balance weights"),
    Limit("dpo_padding_free", "B-DPO needs one row for each response"),
    Limit("processor_type", _TEXT),
    Limit("image_size", _TEXT),
    Limit(
        "pad_to_multiple_of", "Axolotl's collator for it makes batches that TRL's DPO cannot read"
    ),
    Limit(
        "pretraining_dataset",
        "Axolotl's DPO drops it, and nothing would be trained on it",
        remedy="Name preference data in `datasets`.",
        verdict=_DROPPED,
    ),
    Limit("streaming", "Axolotl's DPO drops it: the data would be loaded whole", verdict=_DROPPED),
    Limit(
        "chat_template_kwargs",
        "Axolotl's DPO does not hand them to the chat template",
        remedy="Set them at the head of a template of your own: `chat_template: jinja`, and "
        "`chat_template_jinja: '{% set enable_thinking = false %}...'`.",
        verdict=_DROPPED,
    ),
    Limit(
        "default_system_message",
        "Axolotl's DPO renders the chat template without it",
        remedy="Write it as a message of the role `system` into the data.",
        verdict=_DROPPED,
    ),
    Limit("train_on_inputs", "in Axolotl's DPO the loss is on the responses", verdict=_DROPPED),
    Limit("context_parallel_size", _WHOLE, _ONE, "Set it to 1."),
    Limit("sequence_parallel_degree", _WHOLE, _ONE, "Set it to 1."),
    Limit(
        "tensor_parallel_size",
        "in the reference pass each rank scores different rows",
        _ONE,
        "Set it to 1.",
    ),
    Limit("trainer_cls", "it brings its own", (TRAINER,), "Remove one of the two."),
    Limit("trl.sync_ref_model", "the mutual information is that of a frozen reference"),
)

#: An option for `axolotl evaluate`, `merge-lora` and `inference` only.
_GIVEN_ADAPTER = Limit(
    "lora_model_dir",
    "Axolotl's DPO drops it, and neither the policy nor the reference would have that adapter",
    remedy="Merge it into the base model first (`axolotl merge-lora FILE --lora-model-dir DIR`), "
    "and name the result, `merged` in the output folder, as `base_model`.",
    verdict=_DROPPED,
)


def check_trained(cfg: MutableMapping[str, Any]) -> None:
    """Checks options that other commands of Axolotl can honour, but training cannot.

    Raises:
        BDPOError: the configuration names an adapter to continue from.
    """
    check_limits(cfg, (_GIVEN_ADAPTER,), "`rl: bdpo`")


def check_options(cfg: MutableMapping[str, Any], settings: BDPOSettings) -> None:
    values = {**cfg, "trl.sync_ref_model": (cfg.get("trl") or {}).get("sync_ref_model")}
    check_limits(values, LIMITS, "`rl: bdpo`")
    if cfg.get("precompute_ref_log_probs"):  # false is no conflict: B-DPO has its own pass
        settings.check_precompute(True)
    if settings.precompute and cfg.get("adapter") and (cfg.get("fsdp") or cfg.get("fsdp_config")):
        raise BDPOError(
            "Under FSDP a model with an adapter can run only once training has begun, so its "
            "dataset cannot be scored before: set `bdpo_precompute: false`."
        )
