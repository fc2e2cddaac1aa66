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

from bdpo_plugin.settings import (
    PREFIX,
    BDPOError,
    BDPOSettings,
    check_loss_types,
    unknown_key_message,
)

PLUGIN = "bdpo_plugin.BDPOPlugin"
TRAINER = "bdpo_plugin.hosts.axolotl.AxolotlBDPOTrainer"
MARK = "bdpo"
TESTED = ("0.19.0",)

#: Keys that must be off, and why.
_OFF = {
    "dpo_use_weighting": "its own weights on the pairs would multiply B-DPO's",
    "dpo_use_liger_kernel": "the fused loss leaves no place for the balance weights",
    "dpo_padding_free": "B-DPO needs one row for each response",
    "processor_type": "B-DPO has no mutual information for images: text datasets only",
    "image_size": "B-DPO has no mutual information for images: text datasets only",
    "pad_to_multiple_of": "Axolotl's collator for it makes batches that TRL's DPO cannot read",
}
#: Keys that Axolotl's `rl: dpo` drops without a word, what would be missing, and what to do.
_DROPPED = {
    "lora_model_dir": (
        "neither the policy nor the reference would have that adapter",
        "Merge it into the base model first (`axolotl merge-lora`), and name the result as "
        "`base_model`",
    ),
    "pretraining_dataset": (
        "nothing would be trained on it",
        "Name preference data in `datasets`",
    ),
    "streaming": (
        "the data would be loaded whole",
        "Remove it",
    ),
    "train_on_inputs": (
        "the loss is on the responses alone",
        "Remove it",
    ),
}
#: Keys that must be at most 1, and why.
_ONE = {
    "context_parallel_size": "the reference pass needs whole sequences in each rank",
    "sequence_parallel_degree": "the reference pass needs whole sequences in each rank",
    "tensor_parallel_size": "the reference pass gives each rank rows of its own",
}

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
        _check_no_keys(cfg)
        return False
    _check_command_line()
    settings = BDPOSettings.from_keys(cfg)
    losses = check_loss_types(cfg.get("dpo_loss_type") or "sigmoid", "dpo_loss_type")
    _check_options(cfg, settings, losses)
    if (found := version("axolotl")) not in TESTED:
        LOG.warning(f"B-DPO has not been tested with axolotl {found}; tested: {', '.join(TESTED)}.")
    cfg.pop("precompute_ref_log_probs", None)  # B-DPO's own pass does it
    cfg.update({"rl": "dpo", "trainer_cls": TRAINER, MARK: True})
    keys = ", ".join(f"{key}: {value}" for key, value in settings.to_keys().items())
    LOG.info(f"B-DPO: `rl: bdpo` resolved to `rl: dpo` with `trainer_cls: {TRAINER}`; {keys}")
    return True


def check_resolved(cfg: MutableMapping[str, Any]) -> None:
    """Raise BDPOError if a configuration with our mark would not train B-DPO."""
    for key, ours in {"rl": "dpo", "trainer_cls": TRAINER}.items():
        if cfg.get(key) != ours:
            raise BDPOError(
                f"`{MARK}: true` says B-DPO, but `{key}: {cfg.get(key)}` would not train it. "
                f"Write `rl: bdpo`, and neither `{MARK}` nor `trainer_cls`."
            )


def _check_no_keys(cfg: MutableMapping[str, Any]) -> None:
    if cfg.get("inference"):  # `axolotl inference` sets `rl` to nothing
        return
    keys = [key for key in cfg if str(key).startswith(PREFIX) and cfg[key] is not None]
    if keys:
        raise BDPOError(
            f"`{keys[0]}` has no effect with `rl: {cfg.get('rl')}`. Write `rl: bdpo`, or remove: "
            f"{', '.join(keys)}. (Plain DPO with the same YAML: `bdpo_alpha: 0`.)"
        )


def _check_options(
    cfg: MutableMapping[str, Any], settings: BDPOSettings, losses: list[str]
) -> None:
    for key, why in _OFF.items():
        if cfg.get(key):
            raise BDPOError(
                f"`{key}: {cfg[key]}` cannot be used with `rl: bdpo`: {why}. Remove it."
            )
    for key, (missing, remedy) in _DROPPED.items():
        if cfg.get(key) and not (key == "lora_model_dir" and cfg.get("merge_lora")):
            raise BDPOError(
                f"`{key}: {cfg[key]}` has no effect with `rl: bdpo`, nor with `rl: dpo`, in "
                f"Axolotl: {missing}. {remedy}."
            )
    for key, why in _ONE.items():
        if str(cfg.get(key) or 1) != "1":
            raise BDPOError(
                f"`{key}: {cfg[key]}` cannot be used with `rl: bdpo`: {why}. Set it to 1."
            )
    if cfg.get("trainer_cls") not in (None, TRAINER):
        raise BDPOError(
            f"`trainer_cls: {cfg['trainer_cls']}` cannot be used with `rl: bdpo`, which brings its "
            "own. Remove one of the two."
        )
    if (cfg.get("trl") or {}).get("sync_ref_model"):
        raise BDPOError(
            "`trl.sync_ref_model: true` cannot be used with `rl: bdpo`: the mutual information is "
            "that of a frozen reference. Remove it."
        )
    if cfg.get("precompute_ref_log_probs") not in (None, settings.precompute):
        raise BDPOError(
            f"`precompute_ref_log_probs: {cfg['precompute_ref_log_probs']}` contradicts "
            f"`bdpo_precompute: {settings.precompute}`, which decides. Remove the former."
        )
    if settings.precompute and cfg.get("adapter") and (cfg.get("fsdp") or cfg.get("fsdp_config")):
        raise BDPOError(
            "Under FSDP a model with an adapter can run only once training has begun, so its "
            "dataset cannot be scored before: set `bdpo_precompute: false`."
        )
    smoothing = float(cfg.get("dpo_label_smoothing") or 0)
    if smoothing and "robust" not in losses:
        raise BDPOError(
            f"`dpo_label_smoothing: {smoothing}` has no effect on `dpo_loss_type: {losses}`. "
            "Add 'robust' to the losses, or remove it."
        )
    if not 0 <= smoothing < 0.5:
        raise BDPOError(f"`dpo_label_smoothing: {smoothing}` must be in [0, 0.5).")


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
