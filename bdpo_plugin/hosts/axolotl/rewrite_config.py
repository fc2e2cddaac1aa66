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

from bdpo_plugin.hosts.axolotl.limits import TRAINER, check_options
from bdpo_plugin.limits import check_loss, check_no_keys
from bdpo_plugin.settings import PREFIX, BDPOError, BDPOSettings, unknown_key_message

PLUGIN = "bdpo_plugin.BDPOPlugin"
MARK = "bdpo"
#: What the configuration said before it was resolved, as others may see it; for the record.
WRITTEN = "written_of_bdpo"
#: The entries of `datasets` and `test_datasets` as the file says, which Axolotl's validation cuts.
ENTRIES = "entries_of_bdpo"
TESTED = ("0.19.0",)


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
    check_options(cfg, settings)
    _keep_entries(cfg)
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
