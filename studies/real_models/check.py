"""Whether a training did what its name says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from bdpo_plugin import BalanceWeights, balance_weights
from bdpo_plugin.objective.control import controlled
from bdpo_plugin.settings import BDPOSettings


def check(method: str, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """What a training left behind; that it trained what its name says is computed anew.

    Args:
        config: its Axolotl configuration.

    Returns:
        ``steps``; of the last epoch the mean ``margin`` (log-ratio chosen less rejected, nats) and
        ``accuracy`` on the training pairs; with a balanced method ``pairs``, those trained on.

    Raises:
        ValueError: no log or no reward was left, or the weights are not the method's.
    """
    output = Path(config["output_dir"])
    if not (state := output / "trainer_state.json").is_file():
        raise ValueError("no trainer_state.json: the plugin of this benchmark was not active")
    logs = [log for log in json.loads(state.read_text())["log_history"] if "rewards/margins" in log]
    if not logs:
        raise ValueError("no reward was logged: `--set logging_steps=1`")
    last = [log for log in logs if log["epoch"] > logs[-1]["epoch"] - 1]
    found = {
        "steps": logs[-1]["step"],
        "margin": fmean(log["rewards/margins"] for log in last) / float(config["rl_beta"]),
        "accuracy": fmean(log["rewards/accuracies"] for log in last),
    }
    scores = output / "bdpo" / "reference_scores.parquet"
    if scores.exists() != (method != "dpo"):
        raise ValueError(f"{scores} is {'there' if scores.exists() else 'missing'}: not {method}")
    if method == "dpo":
        return found
    table = pq.read_table(scores)
    columns = {name: table[name].to_numpy().copy() for name in table.column_names}
    mi = [torch.from_numpy(columns[name]) for name in ("mi_chosen", "mi_rejected")]
    groups = _groups(columns, config, len(mi[0])) if method == "shuffled" else None
    settings = BDPOSettings.from_keys(config)
    had = [torch.from_numpy(columns[n]) for n in ("weight_chosen", "weight_rejected", "scale")]
    plain = _weights(settings, *mi)
    should = plain
    if groups is not None:
        should = _weights(settings, *controlled("shuffled", *mi, seed=seed, groups=groups))
    if not all(map(torch.allclose, had, should)):
        raise ValueError(f"the weights of {scores} are not those of {method}, seed {seed}")
    if groups is not None and all(map(torch.equal, should, plain)):
        raise ValueError(f"shuffling does not change the weights of {len(mi[0])} pairs")
    return found | {"pairs": len(mi[0])}


def _weights(settings: BDPOSettings, mi_chosen: Tensor, mi_rejected: Tensor) -> BalanceWeights:
    return balance_weights(
        mi_chosen,
        mi_rejected,
        alpha=settings.alpha,
        weighting=settings.weighting,
        balance=settings.balance,
        scaling=settings.scaling,
    )


def _groups(columns: dict[str, Any], config: dict[str, Any], pairs: int) -> list[str]:
    """The kinds that the control shuffled within, against those of the data."""
    if "control_group" not in columns:
        raise ValueError("the scores are not those of shuffled: they name no kinds")
    groups = columns["control_group"].tolist()
    data = Path(config["datasets"][0]["path"]).read_text("utf-8").splitlines()
    there = Counter(json.loads(line)["label"] for line in data)
    if Counter(groups) - there:
        raise ValueError(f"the kinds of the scores are not those of the {pairs} pairs trained on")
    return groups
