"""The curves of runs that `bdpo plot` draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bdpo_plugin.cli.mi_figures import STYLE, plain
from bdpo_plugin.cli.pair_labels import COLOURS
from bdpo_plugin.output.run_folder import Run, evaluations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Key of the log -> title and unit of its panel.
_PANELS = {
    "loss": ("Loss", "per pair, nats"),
    "rewards/margins": ("Reward margin", "chosen − rejected"),
    "rewards/accuracies": ("Accuracy", "share of pairs with a positive margin"),
    "rewards/chosen": ("Reward of chosen", "beta × log-ratio to the reference"),
    "rewards/rejected": ("Reward of rejected", "beta × log-ratio to the reference"),
    "logps/chosen": ("Log-probability of chosen", "of the response, nats"),
    "logps/rejected": ("Log-probability of rejected", "of the response, nats"),
}
#: Values of which a grey line marks the state before training.
_START = {
    "rewards/margins": 0.0,
    "rewards/accuracies": 0.5,
    "rewards/chosen": 0.0,
    "rewards/rejected": 0.0,
}
_MARKERS = "os^DPvX*"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.2)), (0, (1.5, 1)), (0, (6, 1, 1, 1)))
#: The widths of the lines of the first and of the last run. Where lines coincide, the wider ones
#: below stay visible.
_WIDEST, _THINNEST = 6.0, 1.8


def curves(runs: Sequence[Run], path: Path) -> Path:
    """Draws loss, margin, accuracy, rewards and log-probabilities over the steps, and the weights.

    A panel is left out if no run has its figures, so there are at most eight. Training is drawn as
    a moving average over a tenth of the run, evaluation as dots. The axes are those of these; the
    values of single steps, which are drawn for one run alone, may lie outside.
    """
    keys = [key for key in _PANELS if any(key in entry for run in runs for entry in run.log)]
    weighed = any(run.scores is not None for run in runs)
    names = dict.fromkeys(name for run in runs for name in evaluations(run.log))
    markers = dict(zip(names, itertools.cycle(_MARKERS), strict=False))
    columns = -(-(len(keys) + weighed) // 2)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, columns, figsize=(4.5 * columns, 8), layout="constrained", squeeze=False
        )
        panels = iter(axes.flat)
        for key, axis in zip(keys, panels, strict=False):
            _draw_curves(axis, runs, key, markers)
        if weighed:
            _draw_weights(next(panels), runs)
        for axis in panels:
            axis.axis("off")
        _legend(figure, runs, markers)
        figure.savefig(path)
        plt.close(figure)
    return path


def _draw_curves(axis: Axes, runs: Sequence[Run], key: str, markers: Mapping[str, str]) -> None:
    title, unit = _PANELS[key]
    shown: list[np.ndarray] = []
    for run, line in zip(runs, _lines(runs), strict=True):
        steps, values = _series(run.log, key)
        mean = _smoothed(values)
        if len(runs) == 1:
            axis.plot(steps, values, color=line["color"], alpha=0.2, lw=1)
        axis.plot(steps, mean, **line)
        shown.append(mean)
        for name, log in evaluations(run.log).items():
            steps, values = _series(log, key)
            size = 5 + line["lw"]
            style = {"color": line["color"], "ms": size, "mec": "white", "mew": 0.8, "zorder": 3}
            axis.plot(steps, values, markers[name], **style)
            shown.append(values)
    axis.set_title(title)
    axis.set_ylabel(unit, color="#444444")
    axis.set_xlabel("step", color="#444444")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if key in _START:
        axis.axhline(_START[key], color="#999999", lw=0.8)
    if key == "rewards/accuracies":
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    finite = np.concatenate(shown)
    finite = finite[np.isfinite(finite)]
    if len(finite):
        margin = 0.08 * max(np.ptp(finite), 1e-6 * abs(finite).max(), 1e-9)
        axis.set_ylim(finite.min() - margin, finite.max() + margin)


def _draw_weights(axis: Axes, runs: Sequence[Run]) -> None:
    """Draws the distribution of the weights over the training pairs."""
    for run, line in zip(runs, _lines(runs), strict=True):
        if run.scores is not None:
            ordered = np.sort(run.scores["weight_chosen"].to_numpy())
            axis.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), **line)
    axis.set_title("Weights")
    axis.set_xlabel("weight of chosen (1 is DPO)", color="#444444")
    axis.set_ylabel("share of the training pairs up to here", color="#444444")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _lines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the style of each run's line, so that coinciding lines can be told apart."""
    widths = np.linspace(_WIDEST, _THINNEST, len(runs)) if len(runs) > 1 else [2.0]
    return [
        {
            "color": COLOURS[i % len(COLOURS)],
            "ls": _DASHES[i // len(COLOURS) % len(_DASHES)],
            "lw": float(width),
        }
        for i, width in enumerate(widths)
    ]


def _legend(figure: Figure, runs: Sequence[Run], markers: Mapping[str, str]) -> None:
    """Draws the legend below the panels."""
    grey = "#777777"
    handles = [
        Line2D([], [], label=plain(run.name), **line)
        for run, line in zip(runs, _lines(runs), strict=True)
    ]
    if len(runs) == 1:
        handles.append(Line2D([], [], color=grey, alpha=0.4, lw=1, label="each step"))
    for name, marker in markers.items():
        words = f"evaluation of {plain(name)}" if name else "evaluation"
        style: dict[str, Any] = {"ls": "", "marker": marker, "color": grey, "ms": 8, "mec": "white"}
        handles.append(Line2D([], [], label=words, **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=11)


def _series(log: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(entry["step"], entry[key]) for entry in log if key in entry]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Moving average: the mean over a window of a tenth of the run, smaller near the ends."""
    half = len(values) // 20
    windows = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return np.array([window.mean() for window in windows])
