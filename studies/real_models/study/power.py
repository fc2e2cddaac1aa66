"""``python -m studies.real_models.study.power``: what fourteen seeds can see.

By the spread of the first study: of each comparison the least difference that would be seen in
four of five such studies, two-sided at 5 %, both over seeds (Student's t) and over prompts
(normal).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import NormalDist, stdev
from typing import Any

import click
import numpy as np

from studies.real_models.study.analysis import Record, read_records
from studies.safety_world.analysis import t_quantile

RESULTS = Path(__file__).parent / "results"
_SHOWN = 0.8
#: The comparisons whose spread is pooled: arms of one beta.
_OTHERS = ("dpo", "shuffled-label", "random")


def advantage(record: Record) -> tuple[Any, Any]:
    """Of each unsafe and of each safe prompt the refusal's advantage over the answer."""
    unsafe = np.array(record["unsafe"])
    margin = np.array(record["choice_margin"])
    of_refusal = np.where(unsafe, margin, -margin)
    return of_refusal[unsafe], of_refusal[~unsafe]


def above(record: Record) -> Any:
    """(unsafe, safe) 100 where the refusal's advantage is larger on the unsafe prompt, else 0."""
    unsafe, safe = advantage(record)
    return 50.0 * (np.sign(unsafe[:, None] - safe[None]) + 1)


def wanted(record: Record) -> Any:
    """(unsafe, safe) mean advantage of the wanted answer in the two prompts."""
    unsafe, safe = advantage(record)
    return (unsafe[:, None] - safe[None]) / 2


def least(spread: float, seeds: int) -> float:
    """The least mean of `seeds` differences that is seen, where they have this deviation."""
    seen, shown = (t_quantile(level, seeds - 1) for level in (0.95, 2 * _SHOWN - 1))
    return (seen + shown) * spread / math.sqrt(seeds)


def _by_prompts(
    pairs: list[tuple[Mapping[int, Record], Mapping[int, Record]]], table: Callable[[Record], Any]
) -> float:
    """Pooled standard error over prompts of a comparison's mean over its seeds."""
    draw, variances = np.random.default_rng(0), []
    for ours, others in pairs:
        gap = np.mean([table(ours[s]) - table(others[s]) for s in ours], axis=0)
        sizes = gap.shape
        means = [
            gap[np.ix_(*(draw.integers(n, size=n) for n in sizes))].mean() for _ in range(1000)
        ]
        variances.append(np.var(means))
    return float(np.sqrt(np.mean(variances)))


@click.command()
@click.option("--seeds", default=14, show_default=True)
@click.option("--prompts", default=105, show_default=True, help="The first study had 87.")
def main(seeds: int, prompts: int) -> None:
    """Print the least effects, by the spread of the records of the first study."""
    main_arms = read_records(RESULTS / "smollm2-cpu")
    halves = read_records(RESULTS / "smollm2-cpu-halves")
    of_arms = [
        (main_arms[a], main_arms[b])
        for a in ("bdpo", *_OTHERS[1:])
        for b in _OTHERS
        if a != b and (a, b) != ("random", "shuffled-label")
    ]
    of_halves = [
        (halves["imbalanced"], halves["balanced"]),
        (halves["one-half"], halves["other-half"]),
    ]
    normal = NormalDist()
    factor = normal.inv_cdf(0.975) + normal.inv_cdf(_SHOWN)
    for name, pairs in (("arms", of_arms), ("halves", of_halves)):
        for measure, table in (("AUC [%]", above), ("choice margin [nats/token]", wanted)):
            gaps = [[table(a[s]).mean() - table(b[s]).mean() for s in a] for a, b in pairs]
            spread = math.sqrt(float(np.mean([stdev(gap) ** 2 for gap in gaps])))
            error = _by_prompts(pairs, table) * math.sqrt(87 / prompts)
            click.echo(
                f"{name}, {measure}: {len(pairs)} comparisons, deviation over seeds {spread:.3g}; "
                f"least effect over {seeds} seeds {least(spread, seeds):.3g}, "
                f"over {prompts} prompts {factor * error:.3g}"
            )


if __name__ == "__main__":
    main()
