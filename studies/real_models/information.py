"""What the mutual information (MI) goes with in real text.

``python -m studies.real_models.information``, on the scores of ``bdpo mi``, whose picture is the
paper's Figure 2.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.stats import spearmanr

from studies.real_models.refusal import outcome

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_BEGINNINGS = 8
Values = NDArray[Any]


@click.command()
@click.argument("data", type=_FILE)
@click.argument("scores", type=_FILE)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: shown]")
def main(data: Path, scores: Path, output: Path | None) -> None:
    """Tables of the MI of DATA, pairs of `bdpo data`, from SCORES, the reference_scores.parquet of
    `bdpo mi` on it."""
    pairs = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    text = "\n".join(tables(pairs, pq.read_table(scores).to_pydict())) + "\n"
    if output:
        output.write_text(text, encoding="utf-8")
    click.echo(output or text)


def tables(pairs: Sequence[dict[str, Any]], scores: dict[str, list[Any]]) -> Iterator[str]:
    """Shares by label, rank correlations, beginnings, and how much of the imbalance they explain.

    Args:
        pairs: with ``label``, ``chosen`` and ``rejected``.
        scores: columns of reference_scores.parquet, ``row`` being the place in `pairs`.
    """
    taken = [pairs[row] for row in scores["row"]]
    labels = np.array([pair["label"] for pair in taken])
    mi = {side: np.array(scores[f"mi_{side}"]) for side in ("chosen", "rejected")}
    yield from _shares(labels, mi["chosen"], mi["rejected"], len(pairs))
    features = {side: _features(taken, scores, side) for side in mi}
    yield from _correlations(mi, features)
    yield from _beginnings(taken, mi)
    yield from _explained(labels, mi["chosen"] - mi["rejected"], features)


def _shares(labels: Values, chosen: Values, rejected: Values, all_pairs: int) -> Iterator[str]:
    yield f"{len(chosen)} of {all_pairs} pairs were scored. MI in nats per token: 5, 50, 95 %."
    yield ""
    yield "| label | pairs | MI of chosen | MI of rejected | chosen higher |"
    yield "| --- | --- | --- | --- | --- |"
    for label in [*sorted(set(labels)), "all"]:
        of = slice(None) if label == "all" else labels == label
        quantiles = [
            " / ".join(f"{q:.2f}" for q in np.quantile(side[of], [0.05, 0.5, 0.95]))
            for side in (chosen, rejected)
        ]
        share = 100 * (chosen[of] > rejected[of]).mean()
        yield f"| {label} | {len(chosen[of])} | {' | '.join(quantiles)} | {share:.0f} % |"
    yield ""


def _features(pairs: Sequence[dict[str, Any]], scores: dict[str, list[Any]], side: str) -> Any:
    """Name -> (B,) of the responses of one side."""
    tokens = np.array(scores[f"{side}_tokens"], dtype=float)
    texts = [pair[side]["content"] for pair in pairs]
    return {
        "length [tokens]": tokens,
        "refuses, by the phrase rule": np.array([outcome(t) == "refused" for t in texts], float),
        "log-probability [nats per token]": np.array(scores[f"ref_{side}_logps"]) / tokens,
    }


def _correlations(mi: dict[str, Values], features: dict[str, dict[str, Values]]) -> Iterator[str]:
    yield "Spearman's rank correlation of a response's MI, and of I_w - I_l with the difference:"
    yield ""
    yield "| | chosen | rejected | difference |"
    yield "| --- | --- | --- | --- |"
    for name in features["chosen"]:
        both = [features[side][name] for side in mi]
        values = [*zip(both, mi.values(), strict=True)]
        values.append((both[0] - both[1], mi["chosen"] - mi["rejected"]))
        cells = [f"{spearmanr(x, y).statistic:+.2f}" if np.ptp(x) else "–" for x, y in values]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def _beginnings(pairs: Sequence[dict[str, Any]], mi: dict[str, Values]) -> Iterator[str]:
    found: dict[str, list[float]] = {}
    for side, values in mi.items():
        for pair, value in zip(pairs, values.tolist(), strict=True):
            words = " ".join(pair[side]["content"].split()[:2])
            found.setdefault(words, []).append(value)
    often = Counter({words: len(values) for words, values in found.items()})
    yield f"The {_BEGINNINGS} most common beginnings of a response:"
    yield ""
    yield "| first two words | responses | median MI |"
    yield "| --- | --- | --- |"
    for words, count in often.most_common(_BEGINNINGS):
        yield f"| {words.replace('|', ' ')} | {count} | {np.median(found[words]):.2f} |"
    yield ""


def _explained(
    labels: Values, difference: Values, features: dict[str, dict[str, Values]]
) -> Iterator[str]:
    yield "Share of the variance of I_w - I_l that a linear regression explains (adjusted R²):"
    yield ""
    yield "| on | adjusted R² |"
    yield "| --- | --- |"
    columns: list[Values] = [(labels == label).astype(float) for label in sorted(set(labels))]
    names = "the label"
    yield f"| {names} | {adjusted(columns, difference):.2f} |"
    for name, chosen in features["chosen"].items():
        columns.append(chosen - features["rejected"][name])
        names += f", and the difference in: {name.partition(' [')[0]}"
        yield f"| {names} | {adjusted(columns, difference):.2f} |"
    yield ""


def adjusted(columns: Sequence[Values], values: Values) -> float:
    """Adjusted R² of the least squares of `values` (B,) on `columns` (B,), which sum to a
    constant."""
    matrix = np.stack(columns, axis=1)
    solved, _, rank, _ = np.linalg.lstsq(matrix, values, rcond=None)
    left = values - matrix @ solved
    freedom = len(values) - rank
    return float(1 - left.var() * len(values) / freedom / values.var(ddof=1))


if __name__ == "__main__":
    main()
