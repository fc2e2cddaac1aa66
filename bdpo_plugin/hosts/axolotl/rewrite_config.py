"""Rewrites `rl: bdpo` in an Axolotl configuration to `rl: dpo` with our trainer, or refuses it.

Axolotl tests `rl` in many places (dataset schema, length filter, loading of adapter and reference
model, FSDP) and accepts a fixed list of values. B-DPO therefore runs as `rl: dpo` with its own
trainer class and the mark ``bdpo: true``, which every later check reads.
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
#: Key of the redacted configuration before :func:`resolve`, for the record of the run.
WRITTEN = "written_of_bdpo"
#: Key of the entries of `datasets` and `test_datasets` before Axolotl's validation drops keys.
ENTRIES = "entries_of_bdpo"
TESTED = ("0.19.0",)


# Axolotl shows INFO messages only of loggers whose names begin with its own.
LOG = get_logger("axolotl.bdpo")


def resolve(cfg: MutableMapping[str, Any]) -> bool:
    """Rewrites a B-DPO configuration, before Axolotl validates it, to one that Axolotl can run.

    Changes ``cfg`` in place. A configuration that has been rewritten before stays as it is, as
    Axolotl may validate it again (it does in each Ray worker).

    Returns:
        True if this is a B-DPO run.

    Raises:
        BDPOError: a ``bdpo_*`` key is invalid, unknown or used without `rl: bdpo`, or B-DPO cannot
            honour a loss type or an option of Axolotl.
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
    cfg.pop("precompute_ref_log_probs", None)  # B-DPO's own reference pass computes them
    cfg.update({"rl": "dpo", "trainer_cls": TRAINER, MARK: True})
    keys = ", ".join(f"{key}: {value}" for key, value in settings.to_keys().items())
    LOG.info(f"B-DPO: `rl: bdpo` resolved to `rl: dpo` with `trainer_cls: {TRAINER}`; {keys}")
    return True


def check_resolved(cfg: MutableMapping[str, Any]) -> None:
    """Raises BDPOError if a configuration with our mark would not train B-DPO."""
    for key, ours in {"rl": "dpo", "trainer_cls": TRAINER}.items():
        if cfg.get(key) != ours:
            raise BDPOError(
                f"`{MARK}: true` says B-DPO, but `{key}: {cfg.get(key)}` would not train it. "
                f"Write `rl: bdpo`, and neither `{MARK}` nor `trainer_cls`."
            )


def _keep_entries(cfg: MutableMapping[str, Any]) -> None:
    """Checks the keys that Axolotl drops, and keeps the dataset entries that a run restores."""
    from bdpo_plugin.hosts.axolotl.entries import check_entries, written_entries
    from bdpo_plugin.hosts.axolotl.schema import dropped_words

    check_entries(cfg)
    cfg[ENTRIES] = written_entries(cfg)
    for words in dropped_words(cfg):
        LOG.warning(f"B-DPO: {words}")


def _check_command_line() -> None:
    """Raises BDPOError for ``--bdpo-...`` options that `axolotl train` would silently drop."""
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
