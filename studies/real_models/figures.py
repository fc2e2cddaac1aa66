"""The figures of a preset: the paper's 2 to 5, every arm's choice, and the curves over epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from studies.real_models.analysis import (
    ANSWERS,
    AUC,
    CHOICE,
    HELD_OUT,
    HELD_OUT_MARGIN,
    MARGIN,
    Measure,
    Record,
    Records,
    after_epoch,
    level,
    there,
)
from studies.real_models.design import NAMES

_MARKS = "os^Dv<>PXh"
_COLOURS = {"bdpo": "tab:blue", "dpo": "tab:orange", "untrained": "tab:gray"}
_HALVES = ("imbalanced", "balanced", "one-half", "other-half")
TRAINING_MARGIN = Measure("margin of training [nats]", lambda r: [[r["train_margin"]]], 2)


def draw(records: Records, folder: Path, after: Sequence[int]) -> None:
    """All figures that the records have something for."""
    made: dict[str, Callable[[Records], Any]] = {
        "choice.png": _choice,
        "information.png": _information,
        "halves.png": _halves,
        "alpha.png": _alphas,
        "epochs.png": lambda found: _epochs(found, after),
    }
    for name, figure_of in made.items():
        (folder / name).unlink(missing_ok=True)
        if figure := figure_of(records):
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)


def _have(records: Records, *measures: Measure) -> list[Measure]:
    runs = [record for of_arm in records.values() for record in of_arm.values()]
    return [m for m in measures if any(there(record, m) for record in runs)]


def _choice(records: Records) -> Any:
    """Choice of each arm, or what else there is: a mark for a seed, and a line at their mean."""
    if not (found := _have(records, CHOICE, HELD_OUT)):
        return None
    return _by_arm(records, [arm for arm in NAMES if arm in records], found[:1])


def _halves(records: Records) -> Any:
    """The paper's Figures 3 and 4: the margin of training, and what comes of it."""
    arms = [arm for arm in _HALVES if arm in records]
    return _by_arm(records, arms, _have(records, TRAINING_MARGIN, AUC, HELD_OUT)) if arms else None


def _by_arm(records: Records, arms: list[str], measures: list[Measure]) -> Any:
    figure, panels = plt.subplots(
        1,
        len(measures),
        sharey=True,
        squeeze=False,
        figsize=(4 + 4 * len(measures), 0.5 * len(arms) + 1.2),
        layout="constrained",
    )
    for axes, measure in zip(panels[0], measures, strict=True):
        for place, arm in enumerate(reversed(arms)):
            values = {s: level(r, measure) for s, r in records[arm].items() if there(r, measure)}
            colour = _COLOURS.get(arm, "tab:green")
            for seed, value in values.items():
                mark = _MARKS[seed % len(_MARKS)] if arm != "untrained" else "|"
                axes.plot(value, place, mark, color=colour, alpha=0.7)
            if values:
                axes.plot([fmean(values.values())] * 2, [place - 0.3, place + 0.3], color=colour)
        axes.set_yticks(range(len(arms)), [NAMES[arm] for arm in reversed(arms)])
        axes.set_xlabel(f"{measure.name}; each mark is a seed")
        axes.grid(axis="x", alpha=0.3)
    return figure


def _information(records: Records) -> Any:
    """The paper's Figure 2: mutual information of the two responses of each training pair."""
    runs = [r for r in records.get("bdpo", {}).values() if "mi_chosen" in r]
    if not runs:
        return None
    figure, axes = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    sides = [[value for run in runs for value in run[f"mi_{s}"]] for s in ("chosen", "rejected")]
    axes.plot(*sides, ".", alpha=0.3)
    axes.axline((0, 0), slope=1, color="tab:gray", linewidth=1)
    axes.set_xlabel("MI of the chosen response [nats/token]")
    axes.set_ylabel("MI of the rejected response [nats/token]")
    return figure


def _alphas(records: Records) -> Any:
    """The paper's Figure 5: by alpha, DPO being 0; a mark for a seed."""
    grid = [arm for arm in records if arm not in NAMES]
    if not grid or "dpo" not in records:
        return None
    beta = next(iter(records["dpo"].values()))["settings"]["beta"]
    by_alpha: dict[float, list[Record]] = {}
    for arm in ("dpo", "bdpo", *grid):
        for record in records.get(arm, {}).values():
            if record["settings"]["beta"] == beta:
                by_alpha.setdefault(record["settings"]["bdpo_alpha"], []).append(record)
    groups = [_have(records, *some) for some in ((AUC, CHOICE), (HELD_OUT,), ANSWERS[1:3])]
    groups = [group for group in groups if group]
    figure, panels = plt.subplots(
        1, len(groups), squeeze=False, figsize=(4.5 * len(groups), 3.6), layout="constrained"
    )
    for axes, measures in zip(panels[0], groups, strict=True):
        for measure in measures:
            _line(axes, sorted(by_alpha.items()), measure, measure.name)
        axes.set_xlabel("alpha (0 is DPO); each mark is a seed")
        axes.set_xticks(sorted(by_alpha))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def _epochs(records: Records, after: Sequence[int]) -> Any:
    """Every arm over the epochs: a thin line for a seed, a thick one for the mean."""
    arms = [arm for arm in NAMES if arm in records and arm != "untrained"]
    measures = _have(
        after_epoch(records, after[-1]) if after else {},
        *(AUC, MARGIN, HELD_OUT, HELD_OUT_MARGIN, TRAINING_MARGIN),
    )
    if len(after) < 2 or not measures:
        return None
    figure, panels = plt.subplots(
        len(measures),
        len(arms),
        squeeze=False,
        sharex=True,
        sharey="row",
        figsize=(1.2 + 2 * len(arms), 2 * len(measures)),
        layout="constrained",
    )
    found = {epoch: after_epoch(records, epoch) for epoch in after}
    for measure, row in zip(measures, panels, strict=True):
        row[0].set_ylabel(measure.name.replace(" [", "\n["), fontsize=8)
        of_dpo = list(_means(found, "dpo", measure)) if "dpo" in arms else []
        for arm, axes in zip(arms, row, strict=True):
            for seed in sorted(records[arm]):
                of_seed = [(epoch, found[epoch][arm][seed]) for epoch in after]
                places = [(x, level(run, measure)) for x, run in of_seed if there(run, measure)]
                axes.plot(
                    *zip(*places, strict=True), ".-", color="tab:gray", alpha=0.4, linewidth=0.8
                )
            if of_dpo:
                axes.plot(*zip(*of_dpo, strict=True), ".--", color="tab:orange", linewidth=1)
            means = _means(found, arm, measure)
            axes.plot(*zip(*means, strict=True), ".-", color="tab:blue", linewidth=2)
            axes.set_xticks(after)
            axes.grid(alpha=0.3)
    for arm, axes in zip(arms, panels[0], strict=True):
        axes.set_title(NAMES[arm].replace(": ", ":\n"), fontsize=8)
    figure.supxlabel("epochs; grey: each seed, blue: their mean, dashed: DPO's mean", fontsize=8)
    return figure


def _means(found: dict[int, Records], arm: str, measure: Measure) -> Iterator[tuple[int, float]]:
    """Each epoch after which the measure was taken, and its mean over the seeds."""
    for epoch, records in found.items():
        levels = [level(run, measure) for run in records[arm].values() if there(run, measure)]
        if levels:
            yield epoch, fmean(levels)


def _line(axes: Any, groups: list[tuple[float, list[Record]]], measure: Measure, name: str) -> None:
    levels = [(x, [level(r, measure) for r in of_x if there(r, measure)]) for x, of_x in groups]
    levels = [(x, values) for x, values in levels if values]
    (line,) = axes.plot([x for x, _ in levels], [fmean(v) for _, v in levels], label=name)
    for x, values in levels:
        axes.plot([x] * len(values), values, "o", color=line.get_color(), alpha=0.5)
