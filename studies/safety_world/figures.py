"""The figures, each readable without the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt

from studies.safety_world import forests, plots
from studies.safety_world.analysis import difference
from studies.safety_world.design import Experiment, Levels
from studies.safety_world.experiments import BETA, Size

_NULL_PROMPTS = {
    "scaffold": "scaffold (the chat template without the query)",
    "placeholder": "placeholder (a query that asks for nothing)",
    "bos": "the first token alone (BOS)",
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
        "controls": lambda: forests.controls(by_name["controls"], levels["controls"]),
        "ablation": lambda: forests.ablation(levels),
        "conditions": lambda: forests.conditions(size, by_name, levels),
        "epochs": lambda: _epochs(size, levels),
    }
    for name, make in figures.items():
        figure = make()
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def _scatter(surveys: Sequence[dict[str, Any]]) -> Any:
    kinds = {
        "harmful": "harmful queries",
        "benign": "benign queries",
        "lookalike": "look-alikes (harmless, in harmful words)",
    }
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
        f"pretrained model, {plots.counted([len(surveys)])}; on the line both are equal",
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
        found = [plots.level(levels, label, measure, factor) for label in levels]
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
        points = [(a, plots.minus(levels, f"{beta}, alpha {a:g}", zero)) for a in size.alphas]
        shuffled = plots.minus(levels, f"{beta}, control at alpha 1.5", zero)
        plots.line(axis, [(0, difference([0.0])), *points], "B-DPO", plots.COLOURS["B-DPO"])
        name = f"{plots.CONTROL},\nat alpha 1.5 (drawn a little to the right)"
        plots.line(axis, [(1.5 + shift, shuffled)], name, plots.COLOURS["control"])
        axis.axhline(0, color="black", lw=0.8)
        own = plots.level(levels, zero, "score")
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
    after, before = levels["epochs"], levels["base"]
    places = {look: place for place, look in enumerate((0, *size.looks))}
    figure, axes = plt.subplots(3, 3, figsize=(13, 10))
    for axis, (measure, (heading, unit)) in zip(axes.flat, panels.items(), strict=False):
        found = []
        for method, colour in plots.COLOURS.items():
            points = [(0, plots.level(before, "pretrained", measure))]
            points += [
                (places[n], plots.level(after, f"{method}, epoch {n}", measure)) for n in size.looks
            ]
            found += [one for _, one in points]
            label = plots.CONTROL if method == "control" else method
            plots.line(axis, points, label, colour)
        axis.set_title(f"{heading}, {plots.seeds(found)}", fontsize=9)
        axis.set_ylabel(unit, fontsize=8)
    last, compared = axes.flat[-1], []
    for other, colour in (("DPO", "tab:gray"), ("control", "tab:orange")):
        points = [
            (places[n], plots.minus(after, f"B-DPO, epoch {n}", f"{other}, epoch {n}"))
            for n in size.looks
        ]
        compared += [one for _, one in points]
        plots.line(last, points, f"B-DPO less {other}", colour)
    last.axhline(0, color="black", lw=0.8)
    last.set_title(f"score: paired differences, {plots.seeds(compared)}", fontsize=9)
    last.set_ylabel(plots.GAINED, fontsize=8)
    plots.legend(last)
    for axis in axes.flat:
        names = ["0 (before)", *map(str, size.looks)]
        axis.set_xticks(list(places.values()), names, fontsize=8)
        axis.set_xlim(-0.3, len(size.looks) + 0.3)
    for axis in axes[-1]:
        axis.set_xlabel("epochs")
    plots.legend(axes.flat[0])
    figure.suptitle("Many epochs: mean and 95 % interval (bootstrap over the seeds)")
    figure.tight_layout()
    return figure
