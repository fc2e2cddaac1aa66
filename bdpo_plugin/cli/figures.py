"""The pictures that `bdpo plot` and `bdpo mi` draw."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bdpo_plugin.cli.labels import COLOURS, OTHERS
from bdpo_plugin.output.run_folder import evaluations
from bdpo_plugin.terminal import visible

if TYPE_CHECKING:
    import pyarrow
    from matplotlib.axes import Axes

    from bdpo_plugin.output.run_folder import Run

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
}
#: Title, keys of the log (of the chosen response first, then of the rejected one), unit.
_PANELS = (
    ("Loss", ("loss",), "per pair, nats"),
    ("Reward margin", ("rewards/margins",), "chosen − rejected"),
    ("Accuracy", ("rewards/accuracies",), "share of pairs with a positive margin"),
    ("Rewards", ("rewards/chosen", "rewards/rejected"), "beta × log-ratio to the reference"),
    ("Log-probabilities", ("logps/chosen", "logps/rejected"), "of the response, nats"),
)
#: Title, unit, and a function that returns the (B,) values of the training pairs.
_OF_PAIRS: tuple[tuple[str, str, Callable[[pyarrow.Table], np.ndarray]], ...] = (
    ("Weights", "weight of chosen (1 is DPO)", lambda s: s["weight_chosen"].to_numpy()),
    (
        "Imbalance",
        "MI of chosen and rejected responses",
        lambda s: np.abs(s["mi_chosen"].to_numpy() - s["mi_rejected"].to_numpy()),
    ),
)
_OTHERS = "(others)"
#: Markers of one evaluation set: first for the chosen, then for the rejected responses.
_MARKERS = ("ov", "s^", "D<", "P>")
# Blue: a smaller weight than in DPO. Orange: a larger one. The middle is grey, not white.
_WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#2166ac", "#d0d0d0", "#c8500a"])


def curves(runs: Sequence[Run], path: Path) -> Path:
    """Draws loss, reward margin, accuracy, rewards and log-probabilities over the steps.

    Training is drawn as lines, evaluation as dots. For B-DPO runs, two more panels show the
    distribution of the weights and of the MI imbalance over the training pairs.
    """
    scored = [(i, run.scores) for i, run in enumerate(runs) if run.scores is not None]
    names = dict.fromkeys(name for run in runs for name in evaluations(run.log))
    markers = dict(zip(names, itertools.cycle(_MARKERS), strict=False))
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(2, 4 if scored else 3, figsize=(18, 8), layout="constrained")
        panels = list(axes.flat)
        for axis, (title, keys, unit) in zip(panels, _PANELS, strict=False):
            for index, run in enumerate(runs):
                colour = COLOURS[index % len(COLOURS)]
                for key, style in zip(keys, ("-", "--"), strict=False):
                    steps, values = _series(run.log, key)
                    axis.plot(steps, values, color=colour, alpha=0.2, lw=1)
                    axis.plot(steps, _smoothed(values), style, color=colour, lw=2)
                    full = {"color": colour, "ms": 6, "mec": "white", "mew": 1, "zorder": 3}
                    for name, log in evaluations(run.log).items():
                        steps, values = _series(log, key)
                        axis.plot(steps, values, markers[name][style == "--"], **full)
            axis.set_title(title)
            axis.set_ylabel(unit, color="#444444")
            axis.set_xlabel("step", color="#444444")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        loss, margin, accuracy, rewards, _ = panels[: len(_PANELS)]
        loss.set_ylim(bottom=0)
        for axis in (margin, rewards):
            axis.axhline(0, color="#999999", lw=0.8)
        accuracy.axhline(0.5, color="#999999", lw=0.8)
        accuracy.set_ylim(top=1.02)
        accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axis, (title, unit, values_of) in zip(panels[len(_PANELS) :], _OF_PAIRS, strict=False):
            if not scored:
                break
            for index, scores in scored:  # lines get thinner, so that coinciding ones stay visible
                if title == "Imbalance" and not runs[index].measured:
                    continue
                ordered = np.sort(values_of(scores))
                shares = np.arange(1, len(ordered) + 1) / len(ordered)
                width = 2 + 2 * (len(runs) - 1 - index)
                axis.plot(ordered, shares, color=COLOURS[index % len(COLOURS)], lw=width)
            axis.set_title(title)
            axis.set_xlabel(unit, color="#444444")
            axis.set_ylabel("share of the training pairs up to here", color="#444444")
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _curves_legend(panels[-1], runs, markers)
        figure.savefig(path)
        plt.close(figure)
    return path


def _curves_legend(axis: Axes, runs: Sequence[Run], markers: Mapping[str, str]) -> None:
    """Draws the legend in place of the last panel."""
    axis.axis("off")
    grey = "#777777"
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=2, label=_plain(run.name))
        for i, run in enumerate(runs)
    ]
    handles += [
        Line2D([], [], color=grey, lw=2, label="chosen"),
        Line2D([], [], color=grey, lw=2, ls="--", label="rejected"),
        Line2D([], [], color=grey, alpha=0.4, lw=1, label="each step"),
    ]
    for name, pair in markers.items():
        for marker, side in zip(pair, ("chosen", "rejected"), strict=True):
            words = f"evaluation of {_plain(name)}: {side}" if name else f"evaluation: {side}"
            handles.append(
                Line2D([], [], ls="", marker=marker, color=grey, mec="white", label=words)
            )
    axis.legend(handles=handles, loc="center left", fontsize=11)


def mi_scatter(scored: Sequence[tuple[str, pyarrow.Table]], path: Path) -> Path:
    """Draws MI of chosen against MI of rejected, coloured by the weight of the chosen response.

    Args:
        scored: the name of each run, and its scores.
    """
    points = [
        [scores[column].to_numpy() for column in ("mi_chosen", "mi_rejected", "weight_chosen")]
        for _, scores in scored
    ]
    low = min(np.min(p[:2]) for p in points)
    high = max(np.max(p[:2]) for p in points)
    margin = 0.13 * max(high - low, 1e-3)  # space for the percentages in the corners
    limits = (low - margin, high + margin)
    reach = max(max(np.abs(p[2] - 1).max() for p in points), 1e-3)
    with plt.rc_context(_STYLE):
        width = 5.6 * len(scored) + 0.9
        figure, axes = plt.subplots(
            1, len(scored), figsize=(width, 5.9), layout="constrained", squeeze=False
        )
        panels = zip(axes[0], scored, points, strict=True)
        for axis, (name, scores), (chosen, rejected, weight) in panels:
            axis.plot(limits, limits, color="#333333", lw=1, ls=(0, (4, 3)), zorder=1)
            dots = axis.scatter(
                chosen,
                rejected,
                c=weight,
                cmap=_WEIGHTS,
                norm=CenteredNorm(vcenter=1, halfrange=reach),
                s=float(np.clip(12000 / len(chosen), 5, 34)),
                linewidths=0.3,
                edgecolors="#444444",
                alpha=0.85,
                zorder=2,
            )
            _share(axis, 0.03, 0.97, np.mean(rejected > chosen), "rejected", "left")
            _share(axis, 0.97, 0.03, np.mean(chosen > rejected), "chosen", "right")
            axis.set(xlim=limits, ylim=limits, aspect="equal")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(MaxNLocator(nbins=6))
            unit = scores.schema.metadata[b"mi_unit"].decode()
            axis.set_xlabel(f"MI of chosen with its query, {unit}")
            axis.set_ylabel(f"MI of rejected with its query, {unit}")
            axis.set_title(f"{_plain(name)}: {len(chosen):,} training pairs")
        bar = figure.colorbar(dots, ax=axes, shrink=0.75, aspect=28)
        bar.set_label("weight of chosen (1 is DPO)")
        bar.outline.set_visible(False)
        figure.savefig(path)
        plt.close(figure)
    return path


def imbalance(
    chosen: np.ndarray,
    rejected: np.ndarray,
    labels: Sequence[str] | None,
    colours: Mapping[str, str],
    unit: str,
    path: Path,
) -> Path:
    """Draws MI of chosen against MI of rejected, as in the paper's Figure 2.

    The picture has the diagonal, the share of pairs above and below it, and both marginal
    histograms.

    Args:
        chosen, rejected: (B,) MI.
        labels: (B,) labels that colour the pairs; None for one colour.
        colours: label -> its colour; labels that are not in it are drawn as others.
        unit: the unit of the MI.
    """
    colour_of = dict(colours) if labels else {"": COLOURS[0]}
    group_of = [n if n in colour_of else _OTHERS for n in labels or [""] * len(chosen)]
    if _OTHERS in group_of:
        colour_of[_OTHERS] = OTHERS
    parts = [np.array([name == group for name in group_of]) for group in colour_of]
    both = np.concatenate([chosen, rejected])
    margin = 0.18 * max(np.ptp(both), 1e-3)  # the corners have text, and no points
    limits = (both.min() - margin, both.max() + margin)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplot_mosaic(
            [["top", "."], ["main", "right"]],
            figsize=(7.4, 7.4),
            layout="constrained",
            width_ratios=(5, 1),
            height_ratios=(1, 5),
        )
        main = axes["main"]
        main.plot(limits, limits, color="#333333", lw=1, ls=(0, (4, 3)), zorder=1)
        for part, colour in zip(parts, colour_of.values(), strict=True):
            size = float(np.clip(12000 / len(chosen), 5, 34))
            main.scatter(
                chosen[part], rejected[part], s=size, color=colour, alpha=0.65, lw=0, zorder=2
            )
        _share(main, 0.03, 0.97, float(np.mean(rejected > chosen)), "rejected", "left")
        _share(main, 0.97, 0.03, float(np.mean(chosen > rejected)), "chosen", "right")
        main.set(xlim=limits, ylim=limits)
        main.set_xlabel(f"MI of chosen with its query, {unit}")
        main.set_ylabel(f"MI of rejected with its query, {unit}")
        drawn: dict[str, Any] = {
            "bins": np.linspace(*limits, 49),
            "stacked": True,
            "color": list(colour_of.values()),
        }
        for name, values in (("top", chosen), ("right", rejected)):
            drawn["orientation"] = "vertical" if name == "top" else "horizontal"
            axes[name].hist([values[part] for part in parts], **drawn)
            axes[name].tick_params(labelbottom=False, labelleft=False, length=0)
            axes[name].grid(visible=False)
            axes[name].spines[:].set_visible(False)
        axes["top"].set_xlim(limits)
        axes["right"].set_ylim(limits)
        axes["top"].set_title(f"{len(chosen):,} training pairs")
        if labels:
            handles = [
                Line2D(
                    [],
                    [],
                    ls="",
                    marker="o",
                    color=colour,
                    label=f"{_plain(name)} ({part.sum():,})",
                )
                for (name, colour), part in zip(colour_of.items(), parts, strict=True)
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
        figure.savefig(path)
        plt.close(figure)
    return path


def _plain(text: str) -> str:
    """Escapes dollar signs in a name, as matplotlib would read a formula between them."""
    return visible(text).replace("\n", " ").replace("$", r"\$")[:60]


def _series(log: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(entry["step"], entry[key]) for entry in log if key in entry]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Moving average: the mean over a window of a tenth of the run, smaller near the ends."""
    half = len(values) // 20
    windows = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return np.array([window.mean() for window in windows])


def _share(axis: Axes, x: float, y: float, share: float, side: str, align: str) -> None:
    axis.text(
        x,
        y,
        f"{share:.0%} of pairs:\n{side} understood better",
        transform=axis.transAxes,
        ha=align,
        va="top" if y > 0.5 else "bottom",
        color="#222222",
        linespacing=1.3,
        bbox={"boxstyle": "square,pad=0.2", "fc": "white", "ec": "none"},
        zorder=1,  # above the grid, below the points
    )
