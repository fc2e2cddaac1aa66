"""Draws docs/images/weights.png, what B-DPO does to one pair: python -m tools.method_picture."""

from pathlib import Path

import matplotlib
import torch

from bdpo_plugin import balance_weights

matplotlib.use("Agg")
from matplotlib import pyplot

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "weights.png"
#: Mutual information of the example's chosen and rejected response, nats per token.
MI = (0.6, 0.1)
BLUE, ORANGE, GREY = "#2a6fbb", "#e07b39", "#666666"


def draw(path: Path) -> None:
    """The mutual information of a pair on the left, its weights in DPO and B-DPO on the right."""
    weights = balance_weights(torch.tensor(MI[:1]), torch.tensor(MI[1:]), scaling=False)
    balanced = (weights.chosen.item(), weights.rejected.item())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    names = ("chosen\nresponse", "rejected\nresponse")
    bars = left.bar(names, MI, color=(BLUE, ORANGE), width=0.5)
    left.bar_label(bars, fmt="%.1f")
    left.set_title("1. Measure each response\nwith the frozen reference model", fontsize=11)
    left.set_ylabel("mutual information\nwith the prompt\n[nats per token]")
    left.set_ylim(0, 0.8)
    for i, (label, values) in enumerate((("DPO", (1.0, 1.0)), ("B-DPO", balanced))):
        places = [2.4 * i, 2.4 * i + 1]
        bars = right.bar(places, values, color=(BLUE, ORANGE), width=0.8)
        right.bar_label(bars, fmt="%.2f")
        right.text(2.4 * i + 0.5, 1.62, label, ha="center", fontsize=11, weight="bold")
    right.axhline(1, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    right.set_xticks([0, 1, 2.4, 3.4], ["chosen", "rejected"] * 2)
    right.set_title("2. Give the better understood one\na lower weight in the loss", fontsize=11)
    right.set_ylabel("weight in the loss")
    right.set_ylim(0, 1.85)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(PICTURE)
