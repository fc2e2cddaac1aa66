"""The figures of paired differences: controls, readings, conditions."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from studies.safety_world import plots
from studies.safety_world.analysis import contrast
from studies.safety_world.design import Experiment, Levels
from studies.safety_world.experiments import BETA, Size
from studies.safety_world.weighting import READINGS
from studies.safety_world.world import MEMORISED

_WORDS = {
    "ours": "the package's defaults",
    "outside": "the scale weighs the pair's loss",
    "ratio": "each weight is the other's share of the MI,\nthe scale a constant",
    "power": "weights from powers of the MI",
    "summed": "MI of the whole response,\nnot for each token",
    "expected": "MI of the expected, not of\nthe actual next token",
    "marginal": "MI against the mean over\n16 other queries",
}
_ARMS = {
    "BW": ("BW: the balance weights alone", "tab:green", "s"),
    "SF": ("SF: the scaling factor alone", "tab:purple", "^"),
    "both": ("both: B-DPO", plots.COLOURS["B-DPO"], "o"),
    "control": ("control: both, MI shuffled within types", plots.COLOURS["control"], "D"),
}
#: Of a table whose labels do not say it themselves.
_CONDITIONS = {
    "epochs": "after {}",
    "imbalance": "{} pairs",
    "noise": "label noise: {}",
    "memorised": f"{MEMORISED} pairs, {{}}",
}


def controls(table: Experiment, levels: Levels) -> Any:
    groups: dict[str, list[plots.Line]] = {"each less DPO": [], "B-DPO less each": []}
    for wanted in table.contrasts():
        one, other = wanted.parts
        name, label = ("each less DPO", one) if other == "DPO" else ("B-DPO less each", other)
        groups[name].append((label, contrast(wanted, levels, "score", factor=100)))
    lines = [line for name, rows in groups.items() for line in ((name, None), *rows)]
    return plots.figure_of_forest("B-DPO and its controls", lines)


def ablation(levels: dict[str, Levels]) -> Any:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 7.5), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    found, over = [], []
    for y, reading in enumerate(READINGS):
        rows = levels[f"ablation-{reading}"]
        for place, (arm, (_, colour, marker)) in enumerate(_ARMS.items()):
            found.append(plots.minus(rows, arm, "DPO"))
            at = y + 0.18 * (place - 1.5)
            plots.interval(left, at, found[-1], colour=colour, marker=marker)
        over.append(plots.minus(rows, "both", "control"))
        plots.interval(right, y, over[-1])
        for axis in (left, right):
            axis.axhline(y + 0.5, color="lightgray", lw=0.6)
    for axis in (left, right):
        axis.axvline(0, color="black", lw=0.8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel(plots.GAINED, fontsize=8)
    names = [f"{reading}: {_WORDS[reading]}" for reading in READINGS]
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_title(f"each arm less DPO, {plots.seeds(found)}", fontsize=9)
    right.set_title(f"both less its control, {plots.seeds(over)}", fontsize=9)
    handles = [
        Line2D([], [], marker=marker, color=colour, ms=5) for _, colour, marker in _ARMS.values()
    ]
    handles += [Line2D([], [], marker="o", ls="", color="black", mfc=c) for c in ("black", "white")]
    labels = [name for name, *_ in _ARMS.values()]
    labels += [
        f"filled: interval excludes 0 (not corrected for {len(found)} comparisons)",
        "hollow: interval includes 0",
    ]
    plots.below(left, handles, labels, columns=2)
    plots.excluding(right, len(over))
    figure.suptitle(
        "Readings of the paper and their ablations: mean and 95 % interval (bootstrap over the "
        "seeds)",
        fontsize=10,
    )
    return figure


def conditions(size: Size, by_name: dict[str, Experiment], levels: dict[str, Levels]) -> Any:
    """B-DPO less its control wherever both are, each difference once."""
    main = size.spec("dpo")(0)
    words = f"main setting: {main.pairs} pairs, {main.epochs} epochs, beta {BETA:.2g}"
    groups: dict[str, list[plots.Line]] = {
        "B-DPO less its control (MI shuffled within types)": [],
        "MI swapped within pairs, less the same control": [],
    }
    ours, swapped = groups.values()
    same = by_name["ablation-ours"]
    (wanted,) = [c for c in same.contrasts() if c.label == "both − control"]
    ours.append((words, contrast(wanted, levels[same.name], "score", factor=100)))
    seen = {same.identity(wanted)}
    for name in ("alpha", "epochs", "pairs", "imbalance", "noise", "memorised"):
        table = by_name[name]
        for wanted in table.contrasts():
            one, other = [*wanted.parts, ""][:2]
            if len(wanted.parts) != 2 or "control" not in other or "control" in one:
                continue
            if (identity := table.identity(wanted)) in seen:
                continue
            seen.add(identity)
            condition = one
            for part in ("B-DPO", "alpha 1.5", "MI swapped within pairs"):
                condition = condition.replace(f", {part}", "").replace(f"{part}, ", "")
            condition = condition.replace("memorised", "one response often in pretraining")
            line = _CONDITIONS.get(name, "{}").format(condition)
            found = contrast(wanted, levels[name], "score", factor=100)
            (swapped if "swapped within" in one else ours).append((line, found))
    lines = [line for name, rows in groups.items() for line in ((name, None), *rows)]
    return plots.figure_of_forest("The score, with one condition changed at a time", lines)
