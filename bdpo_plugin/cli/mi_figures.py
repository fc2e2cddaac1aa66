"""The pictures of mutual information that `bdpo plot` and `bdpo mi` draw, and their style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bdpo_plugin.cli.pair_labels import COLOURS, OTHERS
from bdpo_plugin.terminal import visible

if TYPE_CHECKING:
    import pyarrow
    from matplotlib.axes import Axes


STYLE: dict[Any, Any] = {
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
_OTHERS = "(others)"
# Blue: a smaller weight than in DPO. Orange: a larger one. The middle is grey, not white.
_WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#2166ac", "#d0d0d0", "#c8500a"])


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
    with plt.rc_context(STYLE):
        rows = -(-len(scored) // 4)
        columns = -(-len(scored) // rows)
        size = (5.6 * columns + 0.9, 5.9 * rows)
        figure, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(scored) :]:
            axis.axis("off")
        panels = zip(axes.flat, scored, points, strict=False)
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
            axis.set_title(f"{plain(name)}: {len(chosen):,} training pairs")
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
    with plt.rc_context(STYLE):
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
                    label=f"{plain(name)} ({part.sum():,})",
                )
                for (name, colour), part in zip(colour_of.items(), parts, strict=True)
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
        figure.savefig(path)
        plt.close(figure)
    return path


def plain(text: str) -> str:
    """Escapes dollar signs in a name, as matplotlib would read a formula between them."""
    return visible(text).replace("\n", " ").replace("$", r"\$")[:60]


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
