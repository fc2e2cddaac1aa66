"""The figures, each readable without the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.safety_world import plots
from benchmarks.safety_world.analysis import Difference, contrast, difference
from benchmarks.safety_world.design import Contrast, Experiment, Levels
from benchmarks.safety_world.experiments import BETA, Size
from benchmarks.safety_world.weighting import READINGS
from benchmarks.safety_world.world import MEMORISED

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
_NULL_PROMPTS = {
    "scaffold": "scaffold (the chat template without the query)",
    "placeholder": "placeholder (a query that asks for nothing)",
    "bos": "the first token alone (BOS)",
}
#: Of a table whose labels do not say it themselves.
_CONDITIONS = {
    "epochs": "after {}",
    "imbalance": "{} pairs",
    "noise": "label noise: {}",
    "memorised": f"{MEMORISED} pairs, {{}}",
}


def draw(
    size: Size,
    tables: Sequence[Experiment],
    levels: dict[str, Levels],
    surveys: Sequence[dict[str, Any] | None],
    folder: Path,
) -> None:
    """All figures as PNG files in `folder`."""
    by_name = {table.name: table for table in tables}
    done = [survey for survey in surveys if survey]
    figures: dict[str, Callable[[], Any]] = {
        "fig2_mutual_information": lambda: _scatter(done),
        "fig2_null_prompts": lambda: _agreement(done),
        "fig3_4_subsets": lambda: _subsets(levels["subsets"]),
        "fig5_alpha": lambda: _alpha(size, levels["alpha"]),
        "controls": lambda: _controls(by_name["controls"], levels["controls"]),
        "ablation": lambda: _ablation(levels),
        "conditions": lambda: _conditions(size, by_name, levels),
        "epochs": lambda: _epochs(size, levels),
    }
    for name, make in figures.items():
        figure = make()
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def _minus(levels: Levels, one: str, other: str, measure: str = "score") -> Difference:
    return contrast(Contrast("", {one: 1, other: -1}), levels, measure, factor=100)


def _level(levels: Levels, label: str, measure: str, factor: float = 100) -> Difference:
    return difference([factor * row[measure] for row in levels[label] if row and measure in row])


def _scatter(surveys: Sequence[dict[str, Any]]) -> Any:
    kinds = {
        "harmful": "harmful queries",
        "benign": "benign queries",
        "lookalike": "look-alikes (harmless, in harmful words)",
    }
    found = [difference([0.0] * len(surveys))]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharex=True, sharey=True)
    for axis, (kind, name) in zip(axes, kinds.items(), strict=True):
        pairs = [p for survey in surveys for p in survey["pairs"] if p["kind"] == kind]
        for types in sorted({tuple(pair["types"]) for pair in pairs}):
            points = [pair["mi"] for pair in pairs if tuple(pair["types"]) == types]
            label = f"{types[0]} over {types[1]}"
            axis.scatter(*zip(*points, strict=True), s=6, alpha=0.5, label=label)
        above = fmean(c > r for c, r in (p["mi"] for p in pairs)) if pairs else 0
        axis.axline((0, 0), slope=1, color="black", lw=0.8)
        axis.set_title(
            f"{name}\n{len(pairs)} pairs, the chosen response has more MI in {100 * above:.0f} %",
            fontsize=9,
        )
        axis.set_xlabel("MI of the chosen response with its query\n[nats per token]")
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(
            handles,
            labels,
            title="types: chosen over rejected",
            loc="upper center",
            bbox_to_anchor=(0.5, -0.22),
            ncols=2,
            fontsize=7,
            title_fontsize=7,
            markerscale=2,
            frameon=False,
        )
    axes[0].set_ylabel("MI of the rejected response\n[nats per token]")
    figure.suptitle(
        "Mutual information (MI) of the two responses of a pair with their query, under the "
        f"pretrained model, {plots.seeds(found)}; on the line both are equal",
        y=1.02,
    )
    return figure


def _agreement(surveys: Sequence[dict[str, Any]]) -> Any:
    lines = []
    for way in surveys[0]["agreement"] if surveys else ():
        null, comma, estimator = way.partition(", ")
        signs = [100 * survey["agreement"][way]["sign"] for survey in surveys]
        lines.append((_NULL_PROMPTS.get(null, null) + comma + estimator, difference(signs)))
    return plots.figure_of_forest(
        "Null prompt and estimator: how often I_w − I_l (MI of the chosen less that of the\n"
        "rejected response) has the sign that it has under the marginal over other queries",
        lines,
        unit="% of the pairs; 50 is chance",
        zero=50,
        sign="50",
    )


def _subsets(levels: Levels) -> Any:
    measures = {
        "train_margin": ("margin on the training pairs", "log-ratio chosen less rejected, nats", 1),
        "score": ("score", plots.SCORE, 100),
        "harmful_topics": ("harmful, new topics", "refused, %", 100),
        "harmful_wrappers": ("harmful, new wrappers", "refused, %", 100),
        "benign": ("benign", "answered well, %", 100),
    }
    ticks = []
    for label, name in zip(levels, ("balanced MI", "imbalanced MI"), strict=True):
        pairs = sorted({row["pairs"] for row in levels[label] if row and "pairs" in row})
        count = f"\n{'–'.join(map(str, pairs[:: max(1, len(pairs) - 1)]))} pairs" if pairs else ""
        ticks.append(f"{name}{count}")
    figure, axes = plt.subplots(1, len(measures), figsize=(16, 4))
    for axis, (measure, (heading, unit, factor)) in zip(axes, measures.items(), strict=True):
        found = [_level(levels, label, measure, factor) for label in levels]
        for x, one in enumerate(found):
            if one.seeds:
                errors = [[one.mean - one.low], [one.high - one.mean]]
                axis.bar(x, one.mean, yerr=errors, capsize=5, color="lightgray", width=0.6)
        for seed in zip(*levels.values(), strict=True):
            if all(row and measure in row for row in seed):
                ys = [factor * row[measure] for row in seed]
                axis.plot([0.15, 0.85], ys, ".-", lw=0.6, ms=4, alpha=0.7)
        axis.set_xticks(range(len(ticks)), ticks, fontsize=8)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_title(f"{heading}, {plots.seeds(found)}", fontsize=9)
    figure.suptitle(
        "Plain DPO on pairs of balanced and of imbalanced MI, matched on response types and "
        "length: mean, 95 % interval (bootstrap over the seeds); thin lines: single seeds"
    )
    figure.tight_layout()
    return figure


def _alpha(size: Size, levels: Levels) -> Any:
    figure, axes = plt.subplots(
        1, len(size.betas), figsize=(4.2 * len(size.betas), 4), sharey=True, squeeze=False
    )
    shift = 0.06
    for axis, factor in zip(axes[0], size.betas, strict=True):
        beta = f"beta {BETA * factor:.2g}"
        zero = f"{beta}, DPO"
        points = [(a, _minus(levels, f"{beta}, alpha {a:g}", zero)) for a in size.alphas]
        shuffled = _minus(levels, f"{beta}, control at alpha 1.5", zero)
        plots.line(axis, [(0, difference([0.0])), *points], "B-DPO", plots.COLOURS["B-DPO"])
        name = f"{plots.CONTROL},\nat alpha 1.5 (drawn a little to the right)"
        plots.line(axis, [(1.5 + shift, shuffled)], name, plots.COLOURS["control"])
        axis.axhline(0, color="black", lw=0.8)
        own = _level(levels, zero, "score")
        counted = plots.seeds([*(found for _, found in points), shuffled])
        score = f"{own.mean:.1f}" if own.seeds else "not run"
        axis.set_title(f"{beta} (score of DPO: {score}), {counted}", fontsize=9)
        axis.set_xlabel("alpha (0 is DPO)")
    axes[0, 0].set_ylabel(plots.GAINED, fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle(
        "alpha and beta: B-DPO and its control, each less DPO of the same beta; mean and 95 % "
        "interval (bootstrap over the seeds)",
        fontsize=10,
    )
    figure.tight_layout()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=8)
    return figure


def _controls(table: Experiment, levels: Levels) -> Any:
    groups: dict[str, list[plots.Line]] = {"each less DPO": [], "B-DPO less each": []}
    for wanted in table.contrasts():
        one, other = wanted.parts
        name, label = ("each less DPO", one) if other == "DPO" else ("B-DPO less each", other)
        groups[name].append((label, contrast(wanted, levels, "score", factor=100)))
    lines = [line for name, rows in groups.items() for line in ((name, None), *rows)]
    return plots.figure_of_forest("B-DPO and its controls", lines)


def _ablation(levels: dict[str, Levels]) -> Any:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 7.5), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    found, over = [], []
    for y, reading in enumerate(READINGS):
        rows = levels[f"ablation-{reading}"]
        for place, (arm, (_, colour, marker)) in enumerate(_ARMS.items()):
            found.append(_minus(rows, arm, "DPO"))
            at = y + 0.18 * (place - 1.5)
            plots.interval(left, at, found[-1], colour=colour, marker=marker)
        over.append(_minus(rows, "both", "control"))
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


def _conditions(size: Size, by_name: dict[str, Experiment], levels: dict[str, Levels]) -> Any:
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


def _epochs(size: Size, levels: dict[str, Levels]) -> Any:
    panels = {
        "harmful": ("harmful, in distribution", "refused, %"),
        "harmful_topics": ("harmful, new topics", "refused, %"),
        "harmful_wrappers": ("harmful, new wrappers", "refused, %"),
        "benign": ("benign, in distribution", "answered well, %"),
        "benign_topics": ("benign, new topics", "answered well, %"),
        "lookalike": ("look-alikes", "answered well, %"),
        "score": ("score", plots.SCORE),
        "held_out": ("held out: mean of new topics (both), new wrappers", "%"),
    }
    of_epochs, before = levels["epochs"], levels["base"]
    places = {look: place for place, look in enumerate((0, *size.looks))}
    figure, axes = plt.subplots(3, 3, figsize=(13, 10))
    for axis, (measure, (heading, unit)) in zip(axes.flat, panels.items(), strict=False):
        found = []
        for method, colour in plots.COLOURS.items():
            points = [(0, _level(before, "pretrained", measure))]
            points += [
                (places[n], _level(of_epochs, f"{method}, epoch {n}", measure)) for n in size.looks
            ]
            found += [one for _, one in points]
            label = plots.CONTROL if method == "control" else method
            plots.line(axis, points, label, colour)
        axis.set_title(f"{heading}, {plots.seeds(found)}", fontsize=9)
        axis.set_ylabel(unit, fontsize=8)
    last, compared = axes.flat[-1], []
    for other, colour in (("DPO", "tab:gray"), ("control", "tab:orange")):
        points = [
            (places[n], _minus(of_epochs, f"B-DPO, epoch {n}", f"{other}, epoch {n}"))
            for n in size.looks
        ]
        compared += [one for _, one in points]
        plots.line(last, points, f"B-DPO less {other}", colour)
    last.axhline(0, color="black", lw=0.8)
    last.set_title(f"score: paired differences, {plots.seeds(compared)}", fontsize=9)
    last.set_ylabel("points of 100", fontsize=8)
    last.legend(fontsize=7)
    for axis in axes.flat:
        names = ["0 (before)", *map(str, size.looks)]
        axis.set_xticks(list(places.values()), names, fontsize=8)
        axis.set_xlim(-0.3, len(size.looks) + 0.3)
    for axis in axes[-1]:
        axis.set_xlabel("epochs")
    axes.flat[0].legend(fontsize=7)
    figure.suptitle("Many epochs: mean and 95 % interval (bootstrap over the seeds)")
    figure.tight_layout()
    return figure
