"""Whether a training did what its name says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import torch

from bdpo_plugin.settings import BDPOSettings
from benchmarks.real_models.control import kinds_file, weigh


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
        raise ValueError("no trainer_state.json: the plugin of this benchmark was not in force")
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
    columns = {n: torch.tensor(v) for n, v in pq.read_table(scores).to_pydict().items()}
    mi = columns["mi_chosen"], columns["mi_rejected"]
    settings = BDPOSettings.from_keys(config)
    had = [columns[name] for name in ("weight_chosen", "weight_rejected", "scale")]
    kinds = _kinds(config, len(mi[0])) if method == "shuffled" else []
    should = weigh(method, settings, seed, kinds, *mi)
    if not all(map(torch.allclose, had, should)):
        raise ValueError(f"the weights of {scores} are not those of {method}, seed {seed}")
    plain = weigh("bdpo", settings, seed, [], *mi)
    if method == "shuffled" and all(map(torch.equal, should, plain)):
        raise ValueError(f"shuffling does not change the weights of {len(mi[0])} pairs")
    return found | {"pairs": len(mi[0])}


def _kinds(config: dict[str, Any], pairs: int) -> list[str]:
    """The kinds that the control shuffled within, against those of the data."""
    if not (file := kinds_file(config["output_dir"])).is_file():
        raise ValueError(f"{file} is missing: not shuffled")
    kinds = json.loads(file.read_text())
    data = Path(config["datasets"][0]["path"]).read_text("utf-8").splitlines()
    there = Counter(json.loads(line)["kind"] for line in data)
    if len(kinds) != pairs or Counter(kinds) - there:
        raise ValueError(f"the kinds of {file} are not those of the {pairs} pairs trained on")
    return kinds
