"""What the figures are drawn of: intervals as lines, bars and forests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from studies.safety_world.analysis import Difference, contrast, difference
from studies.safety_world.design import Contrast, Levels

COLOURS = {"DPO": "tab:gray", "B-DPO": "tab:blue", "control": "tab:orange"}
CONTROL = "control: MI shuffled within types"
SCORE = "score: half refusals of harmful,\nhalf help to harmless, %"
GAINED = "score difference, points of 100\n(half refusals of harmful, half help to harmless)"

#: A row of a forest; a heading has no difference.
Line = tuple[str, Difference | None]


def seeds(found: Iterable[Difference]) -> str:
    """How many were averaged, where rows differ from the least to the most."""
    return counted(one.seeds for one in found)


def counted(counts: Iterable[int]) -> str:
    numbers = sorted(set(counts)) or [0]
    least = f"{numbers[0]} to " if len(numbers) > 1 else ""
    return f"{least}{numbers[-1]} seed{'s' * (numbers[-1] != 1)}"


def minus(levels: Levels, one: str, other: str) -> Difference:
    """The difference of the scores of two rows."""
    return contrast(Contrast("", {one: 1, other: -1}), levels, "score", factor=100)


def level(levels: Levels, label: str, measure: str, factor: float = 100) -> Difference:
    """The mean of a row, with its interval."""
    return difference([factor * row[measure] for row in levels[label] if row and measure in row])


def line(axis: Any, points: Sequence[tuple[float, Difference]], label: str, colour: str) -> None:
    """Means with the band of their intervals; one point alone with its bar."""
    points = [(x, found) for x, found in points if found.seeds]
    if not points:
        return
    xs, found = zip(*points, strict=True)
    means = [f.mean for f in found]
    lows, highs = [f.low for f in found], [f.high for f in found]
    if len(xs) > 1:
        axis.fill_between(xs, lows, highs, color=colour, alpha=0.15, lw=0)
        axis.plot(xs, means, "o-", ms=4, lw=1.4, label=label, color=colour)
    else:
        errors = [[means[0] - lows[0]], [highs[0] - means[0]]]
        axis.errorbar(xs, means, errors, fmt="o", ms=5, capsize=3, label=label, color=colour)


def interval(
    axis: Any, y: float, found: Difference, *, zero: float = 0, colour: str = "", marker: str = "o"
) -> None:
    """Of one row. Without a colour: blue if the interval excludes `zero`, else grey.

    With one: filled if it does, else hollow.
    """
    if not found.seeds:
        axis.annotate("no run", (zero, y), fontsize=7, va="center")
        return
    excludes = found.excludes(zero)
    own = COLOURS["B-DPO"] if excludes else COLOURS["DPO"]
    face = "white" if colour and not excludes else colour or own
    axis.plot([found.low, found.high], [y, y], color=colour or own)
    axis.plot(found.mean, y, marker, color=colour or own, ms=5, mfc=face)


def forest(
    axis: Any, lines: Sequence[Line], *, unit: str = GAINED, zero: float = 0, sign: str = "0"
) -> None:
    """Rows with their intervals, headings among them, and a legend of the two colours."""
    for y, (_, found) in enumerate(lines):
        if found is not None:
            interval(axis, y, found, zero=zero)
    axis.axvline(zero, color="black", lw=0.8)
    axis.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=8)
    for tick, (_, found) in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("normal" if found else "bold")
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_xlabel(f"{unit}\nmean and 95 % interval (bootstrap over the seeds)", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    compared = sum(found is not None for _, found in lines)
    excluding(axis, compared, sign)


def excluding(axis: Any, compared: int, sign: str = "0") -> None:
    """The legend of blue and grey, below the axis."""
    handles = [
        Line2D([], [], marker="o", ms=4, color=COLOURS["B-DPO"]),
        Line2D([], [], marker="o", ms=4, color=COLOURS["DPO"]),
    ]
    labels = (
        f"interval excludes {sign} (not corrected for {compared} comparisons)",
        f"interval includes {sign}",
    )
    below(axis, handles, labels)


def legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def below(axis: Any, handles: Sequence[Any], labels: Sequence[str], columns: int = 1) -> None:
    """A legend under the axis and its label, whatever the height of the figure."""
    height = axis.figure.get_figheight() * axis.get_position().height
    axis.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.72 / height),
        ncols=columns,
        fontsize=7,
        frameon=False,
    )


def figure_of_forest(title: str, lines: Sequence[Line], **options: Any) -> Any:
    """A figure of one forest, with the number of seeds in its title."""
    figure, axis = plt.subplots(figsize=(7.5, 1.4 + 0.27 * max(1, len(lines))))
    forest(axis, lines, **options)
    counted = seeds(found for _, found in lines if found is not None)
    axis.set_title(f"{title}\n{counted}", fontsize=9)
    return figure
