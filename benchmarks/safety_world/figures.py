"""The figures, each readable without the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.safety_world.analysis import contrast, difference
from benchmarks.safety_world.experiments import BETA, Contrast, Experiment, Size

Levels = dict[str, dict[str, list[dict[str, Any] | None]]]
_COLOURS = {"DPO": "tab:gray", "B-DPO": "tab:blue", "control": "tab:orange"}
_CONTROL = "control: MI shuffled within types"
_POINTS = "points of 100"


def draw(
    size: Size,
    tables: Sequence[Experiment],
    levels: Levels,
    surveys: Sequence[dict[str, Any] | None],
    folder: Path,
) -> None:
    """All figures as PNG files in `folder`."""
    by_name = {table.name: table for table in tables}
    seeds = f"{len(size.seeds)} seed{'s' * (len(size.seeds) > 1)}"
    done = [survey for survey in surveys if survey]
    figures: dict[str, Callable[[], Any]] = {
        "fig2_mutual_information": lambda: _scatter(done, seeds),
        "fig2_null_prompts": lambda: _agreement(done, seeds),
        "fig3_4_subsets": lambda: _subsets(levels["subsets"], seeds),
        "fig5_alpha": lambda: _alpha(size, levels["alpha"], seeds),
        "controls": lambda: _forest(
            "B-DPO and its controls: score, difference with DPO",
            seeds,
            _with("controls", "DPO", by_name, levels),
        ),
        "ablation": lambda: _forest(
            "Readings and their ablations: score, difference with DPO",
            seeds,
            [
                (f"{name.removeprefix('ablation-')}: {label}", found)
                for name in by_name
                if name.startswith("ablation-")
                for label, found in _with(name, "DPO", by_name, levels)
            ],
        ),
        "conditions": lambda: _forest(
            "Where the MI helps: score, B-DPO less its control (MI shuffled within types)",
            seeds,
            [
                (f"{name}: {label}", found)
                for name in ("imbalance", "noise", "pairs", "memorised", "epochs")
                for label, found in _with(name, "control", by_name, levels)
            ],
        ),
        "epochs": lambda: _epochs(size, levels["epochs"], seeds),
    }
    for name, make in figures.items():
        figure = make()
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def _with(
    name: str, other: str, by_name: dict[str, Experiment], levels: Levels
) -> list[tuple[str, Any]]:
    """The differences of a table's rows with the row, or the rows, called `other`."""
    rows = []
    for wanted in by_name[name].contrasts():
        last = list(wanted.parts)[-1]
        of = last.split(", epoch")[0].rpartition(", ")[2]
        if len(wanted.parts) == 2 and of == other:
            found = contrast(wanted, levels[name], "score", factor=100)
            rows.append((wanted.label.partition(" − ")[0], found))
    return rows


def _values(
    rows: Sequence[dict[str, Any] | None], measure: str, factor: float = 100
) -> list[float]:
    return [factor * row[measure] for row in rows if row]


def _scatter(surveys: Sequence[dict[str, Any]], seeds: str) -> Any:
    kinds = ("harmful", "benign", "lookalike")
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharex=True, sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        pairs = [p for survey in surveys for p in survey["pairs"] if p["kind"] == kind]
        for types in sorted({tuple(pair["types"]) for pair in pairs}):
            points = [pair["mi"] for pair in pairs if tuple(pair["types"]) == types]
            label = f"{types[0]} over {types[1]}"
            axis.scatter(*zip(*points, strict=True), s=6, alpha=0.5, label=label)
        above = (
            fmean(chosen > rejected for chosen, rejected in (p["mi"] for p in pairs))
            if pairs
            else 0
        )
        axis.axline((0, 0), slope=1, color="black", lw=0.8)
        axis.set_title(
            f"{kind}: {len(pairs)} pairs, chosen higher in {100 * above:.0f} %", fontsize=9
        )
        axis.set_xlabel("MI of the chosen response with its query\n[nats per token]")
        axis.legend(fontsize=6, markerscale=2)
    axes[0].set_ylabel("MI of the rejected response\n[nats per token]")
    figure.suptitle(f"Mutual information under the pretrained model, {seeds}")
    return figure


def _agreement(surveys: Sequence[dict[str, Any]], seeds: str) -> Any:
    rows = [
        (way, difference([100 * survey["agreement"][way]["sign"] for survey in surveys]))
        for way in (surveys[0]["agreement"] if surveys else ())
    ]
    title = "Null prompt and estimator: pairs whose I_w − I_l has the marginal's sign"
    return _forest(title, seeds, rows, unit="% of pairs", zero=50)


def _subsets(levels: dict[str, list[dict[str, Any] | None]], seeds: str) -> Any:
    measures = {
        "train_margin": ("margin on training pairs [nats]", 1),
        "score": ("score [%]", 100),
        "harmful_topics": ("harmful, new topics: refused [%]", 100),
        "harmful_wrappers": ("harmful, new wrappers: refused [%]", 100),
        "benign": ("benign: answered well [%]", 100),
    }
    figure, axes = plt.subplots(1, len(measures), figsize=(14, 3.6))
    for axis, (measure, (heading, factor)) in zip(axes, measures.items(), strict=True):
        columns = [_values(rows, measure, factor) for rows in levels.values()]
        axis.bar(range(len(columns)), [fmean(c) if c else 0 for c in columns], color="lightgray")
        for seed in zip(*levels.values(), strict=True):
            if all(seed):
                axis.plot([factor * row[measure] for row in seed], ".-", lw=0.6, ms=4)
        axis.set_xticks(range(len(columns)), [label.replace(" ", "\n") for label in levels])
        axis.set_title(heading, fontsize=9)
    figure.suptitle(f"DPO on balanced and on imbalanced pairs of the same types, {seeds} (lines)")
    figure.tight_layout()
    return figure


def _alpha(size: Size, levels: dict[str, list[dict[str, Any] | None]], seeds: str) -> Any:
    figure, axes = plt.subplots(1, len(size.betas), figsize=(4 * len(size.betas), 3.6), sharey=True)
    for axis, factor in zip(axes, size.betas, strict=True):
        zero = f"beta {BETA * factor:.2g}, DPO"
        names = {a: f"beta {BETA * factor:.2g}, alpha {a:g}" for a in size.alphas}
        control = f"beta {BETA * factor:.2g}, control at alpha 1.5"
        points = [
            (a, contrast(Contrast(n, {n: 1, zero: -1}), levels, "score", factor=100))
            for a, n in names.items()
        ]
        _line(axis, [(0, difference([0.0])), *points], "B-DPO", "tab:blue")
        shuffled = contrast(Contrast(control, {control: 1, zero: -1}), levels, "score", factor=100)
        _line(axis, [(1.55, shuffled)], _CONTROL, "tab:orange")
        axis.axhline(0, color="black", lw=0.8)
        axis.set_title(
            f"beta {BETA * factor:.2g} (DPO {fmean(_values(levels[zero], 'score')):.1f})"
        )
        axis.set_xlabel("alpha (0 is DPO)")
    axes[0].set_ylabel(f"score, difference with DPO\n[{_POINTS}]")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"alpha and beta, {seeds}, 95 % intervals")
    figure.tight_layout()
    return figure


def _line(axis: Any, points: Sequence[tuple[float, Any]], label: str, colour: str) -> None:
    xs, found = zip(*points, strict=True)
    means = [f.mean for f in found]
    if len(xs) > 1:
        lows, highs = [f.low for f in found], [f.high for f in found]
        axis.fill_between(xs, lows, highs, color=colour, alpha=0.15, lw=0)
        axis.plot(xs, means, "o-", ms=4, lw=1.4, label=label, color=colour)
    else:
        errors = [[means[0] - found[0].low], [found[0].high - means[0]]]
        axis.errorbar(xs, means, errors, fmt="o", ms=5, capsize=3, label=label, color=colour)


def _forest(
    title: str,
    seeds: str,
    rows: Sequence[tuple[str, Any]],
    *,
    unit: str = _POINTS,
    zero: float = 0,
) -> Any:
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.26 * max(1, len(rows))))
    for y, (_, found) in enumerate(rows):
        colour = "tab:blue" if found.low > zero or found.high < zero else "tab:gray"
        axis.plot([found.low, found.high], [y, y], color=colour)
        axis.plot(found.mean, y, "o", color=colour, ms=4)
    axis.axvline(zero, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"{unit}; mean and 95 % interval over {seeds}")
    axis.set_title(title, fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    return figure


def _epochs(size: Size, levels: dict[str, list[dict[str, Any] | None]], seeds: str) -> Any:
    panels = {
        "harmful": "harmful, in distribution: refused",
        "harmful_topics": "harmful, new topics: refused",
        "harmful_wrappers": "harmful, new wrappers: refused",
        "benign": "benign: answered well",
        "lookalike": "look-alikes: answered well",
        "score": "score",
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True)
    for axis, (measure, heading) in zip(axes.flat, panels.items(), strict=True):
        for method, colour in _COLOURS.items():
            rows = [(n, levels[f"{method}, epoch {n}"]) for n in size.looks]
            points = [(n, difference(_values(found, measure))) for n, found in rows]
            _line(axis, points, _CONTROL if method == "control" else method, colour)
        axis.set_xscale("log", base=2)
        axis.set_xticks(size.looks, [str(n) for n in size.looks])
        axis.set_title(heading, fontsize=9)
        axis.set_ylabel("%")
    for axis in axes[1]:
        axis.set_xlabel("epochs")
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"Many epochs: mean and 95 % interval over {seeds}")
    figure.tight_layout()
    return figure
