"""`rl: bdpo` in an Axolotl configuration -> `rl: dpo` with our trainer, or a refusal.

Axolotl tests `rl` in many places (dataset schema, length filter, adapter and reference loading,
FSDP) and knows a closed list of its values, so B-DPO runs as `rl: dpo` with a trainer class of
its own and the mark ``bdpo: true``, which every later check reads.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from importlib.metadata import version
from typing import Any

from axolotl.utils.logging import get_logger

from bdpo_plugin.refusals import OFF, Limit, check_limits, check_no_keys
from bdpo_plugin.settings import PREFIX, BDPOError, BDPOSettings, check_loss, unknown_key_message

PLUGIN = "bdpo_plugin.BDPOPlugin"
TRAINER = "bdpo_plugin.hosts.axolotl.AxolotlBDPOTrainer"
MARK = "bdpo"
#: What the configuration said before it was resolved, as others may see it; for the record.
WRITTEN = "written_of_bdpo"
#: The entries of `datasets` and `test_datasets` as the file says, which Axolotl's validation cuts.
ENTRIES = "entries_of_bdpo"
TESTED = ("0.19.0",)

_TEXT = "B-DPO has no mutual information for images: text datasets only"
_WHOLE = "the reference pass needs whole sequences in each rank"
_ONE = (1, "1", *OFF)
_DROPPED = "has no effect"

#: Axolotl's keys that B-DPO cannot honour, and those that its `rl: dpo` drops without a word.
_LIMITS = (
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
        "the reference pass gives each rank rows of its own",
        _ONE,
        "Set it to 1.",
    ),
    Limit("trainer_cls", "it brings its own", (TRAINER,), "Remove one of the two."),
    Limit("trl.sync_ref_model", "the mutual information is that of a frozen reference"),
)

#: What `axolotl evaluate`, `merge-lora` and `inference` read.
_GIVEN_ADAPTER = Limit(
    "lora_model_dir",
    "Axolotl's DPO drops it, and neither the policy nor the reference would have that adapter",
    remedy="Merge it into the base model first (`axolotl merge-lora FILE --lora-model-dir DIR`), "
    "and name the result, `merged` in the output folder, as `base_model`.",
    verdict=_DROPPED,
)

# Axolotl shows INFO only from loggers named after it.
LOG = get_logger("axolotl.bdpo")


def resolve(cfg: MutableMapping[str, Any]) -> bool:
    """Turn a B-DPO configuration, not yet validated by Axolotl, into one that Axolotl can run.

    Changes ``cfg`` in place; one that has been through here before stays as it is, so that
    Axolotl may validate it again (it does in each Ray worker).

    Returns:
        True if this is a B-DPO run.

    Raises:
        BDPOError: a bad or unknown ``bdpo_*`` key, such a key without `rl: bdpo`, a loss type or
            an option of Axolotl that B-DPO cannot honour.
    """
    if cfg.get(MARK) and cfg.get("rl") != "bdpo":
        check_resolved(cfg)
        return True
    if cfg.get("rl") != "bdpo":
        if not cfg.get("inference"):  # `axolotl inference` sets `rl` to nothing
            check_no_keys(cfg, f"rl: {cfg.get('rl')}", "rl: bdpo")
        return False
    _check_command_line()
    settings = BDPOSettings.from_keys(cfg)
    check_loss(
        cfg.get("dpo_loss_type") or "sigmoid",
        cfg.get("dpo_label_smoothing"),
        type_key="dpo_loss_type",
        smoothing_key="dpo_label_smoothing",
    )
    _check_options(cfg, settings)
    _keep_entries(cfg)
    if (found := version("axolotl")) not in TESTED:
        LOG.warning(f"B-DPO has not been tested with axolotl {found}; tested: {', '.join(TESTED)}.")
    cfg.pop("precompute_ref_log_probs", None)  # B-DPO's own pass does it
    cfg.update({"rl": "dpo", "trainer_cls": TRAINER, MARK: True})
    keys = ", ".join(f"{key}: {value}" for key, value in settings.to_keys().items())
    LOG.info(f"B-DPO: `rl: bdpo` resolved to `rl: dpo` with `trainer_cls: {TRAINER}`; {keys}")
    return True


def check_trained(cfg: MutableMapping[str, Any]) -> None:
    """Refuse what a training cannot honour, and other commands of Axolotl's can.

    Raises:
        BDPOError: an adapter to continue from.
    """
    check_limits(cfg, (_GIVEN_ADAPTER,), "`rl: bdpo`")


def check_resolved(cfg: MutableMapping[str, Any]) -> None:
    """Raise BDPOError if a configuration with our mark would not train B-DPO."""
    for key, ours in {"rl": "dpo", "trainer_cls": TRAINER}.items():
        if cfg.get(key) != ours:
            raise BDPOError(
                f"`{MARK}: true` says B-DPO, but `{key}: {cfg.get(key)}` would not train it. "
                f"Write `rl: bdpo`, and neither `{MARK}` nor `trainer_cls`."
            )


def _check_options(cfg: MutableMapping[str, Any], settings: BDPOSettings) -> None:
    values = {**cfg, "trl.sync_ref_model": (cfg.get("trl") or {}).get("sync_ref_model")}
    check_limits(values, _LIMITS, "`rl: bdpo`")
    if cfg.get("precompute_ref_log_probs"):  # false is what the method's own pass makes of it
        settings.check_precompute(True)
    if settings.precompute and cfg.get("adapter") and (cfg.get("fsdp") or cfg.get("fsdp_config")):
        raise BDPOError(
            "Under FSDP a model with an adapter can run only once training has begun, so its "
            "dataset cannot be scored before: set `bdpo_precompute: false`."
        )


def _keep_entries(cfg: MutableMapping[str, Any]) -> None:
    """Check what Axolotl drops of a configuration, and keep what a B-DPO run honours of it."""
    from bdpo_plugin.hosts.axolotl.entries import check_entries, kept
    from bdpo_plugin.hosts.axolotl.schema import dropped_words

    check_entries(cfg)
    cfg[ENTRIES] = kept(cfg)
    for words in dropped_words(cfg):
        LOG.warning(f"B-DPO: {words}")


def _check_command_line() -> None:
    """Refuse ``--bdpo-...`` options that `axolotl train` would drop, as it does unknown ones."""
    for module in ("axolotl.cli.main", "__main__"):
        declared = getattr(sys.modules.get(module), "AXOLOTL_CONFIG_CLI_OPTIONS", None)
        if declared is not None:
            break
    else:  # not the `axolotl` command
        return
    known = {name for option in declared for name in option[0][0].split("/")}
    for argument in sys.argv[1:]:
        option = argument.partition("=")[0]
        key = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        if not (option.startswith("--") and key.startswith(PREFIX)) or option in known:
            continue
        if key not in set(BDPOSettings.keys()):
            raise BDPOError(unknown_key_message(key))
        raise BDPOError(
            f"Axolotl does not know `{option}` and drops it: BDPO_AUTOLOAD=0, or it has another "
            f"form (`axolotl train --help`). Write `{key}` into the YAML."
        )
