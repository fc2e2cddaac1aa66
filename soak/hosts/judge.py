"""Whether two runs of a row came out alike."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from soak.hosts.rows import Row

#: How near two runs must come: absolute for losses and rewards, and the part of the value for sums
#: of log-probabilities, entropies and logits, by what the model computes in. In half precision the
#: rounding of a padded and of a packed batch differ.
TOLERANCES = {
    "float32": (1e-5, 1e-5),
    "bfloat16": (1e-2, 1e-3),
    "4-bit": (1e-3, 1e-3),
    "8-bit": (2e-2, 1e-3),
}
_ABSOLUTE = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
_RELATIVE = ("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy")
_SHARES = ("rewards/accuracies", "mean_token_accuracy")


@dataclass(frozen=True)
class Verdict:
    """What came of a row.

    Attributes:
        holds: whether it is as it must be.
        words: what happened, or what is wrong.
        loss, reward, logps: the largest differences in any step: of the losses (nats), of the
            rewards, of all else as a part of the value; None where there are no steps to compare.
    """

    holds: bool
    words: str
    loss: float | None = None
    reward: float | None = None
    rest: float | None = None


def judge(row: Row, theirs: dict[str, Any], ours: dict[str, Any]) -> Verdict:
    """Compare the results (see run.py) of the host's own DPO and of B-DPO."""
    refused = [result.get("refused") for result in (theirs, ours)]
    wanted = [row.refused == "both", row.refused in ("both", "ours")]
    if [bool(r) for r in refused] != wanted:
        endings = [f"ended: {_short(r)}" if r else "trained" for r in refused]
        return Verdict(False, f"DPO {endings[0]}; B-DPO {endings[1]}")
    if any(wanted):
        if row.says not in refused[1]:
            return Verdict(False, f"refused with other words: {_short(refused[1])}")
        who = "both refuse" if all(wanted) else "B-DPO refuses"
        return Verdict(True, f"{who}: {_short(refused[1])}")
    return _compare(row, theirs["log"], ours["log"])


def _compare(row: Row, theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> Verdict:
    near, nearly = TOLERANCES[row.dtype]
    worst = dict.fromkeys((*_ABSOLUTE, *_RELATIVE, *_SHARES), 0.0)
    compared = 0
    # the logs of steps and of evaluations, in the order in which they came
    steps = [[e for e in log if "loss" in e or "eval_loss" in e] for log in (theirs, ours)]
    if len(steps[0]) != len(steps[1]):
        return Verdict(False, f"{len(steps[0])} logs of DPO, {len(steps[1])} of B-DPO")
    if "all" in row.differs:
        if not all(math.isfinite(entry["loss"]) for entry in ours if "loss" in entry):
            return Verdict(False, "B-DPO's losses are not finite")
        return Verdict(True, f"both train, not compared: {row.differs['all']}")
    for one, other in zip(*steps, strict=True):
        for name, value in one.items():
            plain = re.sub("^eval_", "", name)
            if plain not in worst or plain in row.differs or name in row.differs:
                continue
            if name not in other:
                return Verdict(False, f"B-DPO logs no {name}")
            # below rounding the sign of a margin is chance
            untrained = abs(one.get(name.replace("accuracies", "margins"), 1)) < 10 * near
            if plain == "rewards/accuracies" and untrained:
                continue
            scale = max(abs(value), 1.0) if plain in _RELATIVE else 1.0
            worst[plain] = max(worst[plain], abs(value - other[name]) / scale)
            compared += 1
    losses = [entry["loss"] for entry in theirs if "loss" in entry]
    found = {
        "loss": worst["loss"],
        "reward": max(worst[name] for name in _ABSOLUTE[1:]),
        "rest": max(worst[name] for name in (*_RELATIVE, *_SHARES)),
    }
    far = [name for name in _ABSOLUTE if not worst[name] <= near]
    far += [name for name in (*_RELATIVE, *_SHARES) if not worst[name] <= nearly]
    first = next(entry for entry in ours if "loss" in entry)
    if not abs(first["rewards/margins"]) <= near and "first" not in row.differs:
        return Verdict(False, f"the first margin is {first['rewards/margins']:.2g}", **found)
    if far:
        return Verdict(False, ", ".join(f"{name} {worst[name]:.2g} off" for name in far), **found)
    if len(losses) < 2 or max(losses) - min(losses) <= 2 * near or compared < 2 * len(losses):
        return Verdict(False, f"says nothing: losses {losses}", **found)
    return Verdict(True, "alike", **found)


def _short(error: str) -> str:
    """The first words of an error."""
    line = " ".join(error.split())
    return line if len(line) <= 160 else f"{line[:157]}..."
