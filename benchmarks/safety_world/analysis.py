"""Paired differences over seeds, and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from benchmarks.safety_world.experiments import Contrast

RESAMPLES = 10_000


class Difference(NamedTuple):
    """Over the seeds that have it: the mean, its bootstrap interval, how many are above 0."""

    mean: float
    low: float
    high: float
    improved: int
    seeds: int

    def __str__(self) -> str:
        if not self.seeds:
            return "–"
        text = f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"
        return f"{text}, {self.improved} of {self.seeds}"


def difference(values: Sequence[float], *, level: float = 0.95) -> Difference:
    """Of one value for each seed; percentile bootstrap, always with the same resamples."""
    if not values:
        return Difference(math.nan, math.nan, math.nan, 0, 0)
    array = np.array(values)
    drawn = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Difference(
        float(array.mean()), float(low), float(high), int((array > 0).sum()), len(array)
    )


def contrast(
    wanted: Contrast,
    levels: dict[str, list[dict[str, Any] | None]],
    measure: str,
    *,
    factor: float = 1.0,
    level: float = 0.95,
) -> Difference:
    """A contrast of a measure, times `factor`, over the seeds that have it in all rows."""
    columns = [levels[label] for label in wanted.parts]
    values = [
        factor * sum(f * row[measure] for f, row in zip(wanted.parts.values(), rows, strict=True))
        for rows in zip(*columns, strict=True)
        if all(row is not None and measure in row for row in rows)
    ]
    return difference(values, level=level)


def wilson(successes: float, total: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, correction = successes / total, z**2 / total
    middle = share + correction / 2
    half = z * math.sqrt(share * (1 - share) / total + correction / total / 4)
    return max(0.0, (middle - half) / (1 + correction)), min(
        1.0, (middle + half) / (1 + correction)
    )
