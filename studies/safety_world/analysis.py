"""Paired differences over seeds, their intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from studies.safety_world.design import Contrast, Levels

RESAMPLES = 10_000
#: The most values for which all flips of signs are gone through.
_FLIPPED = 16


class Difference(NamedTuple):
    """Over the seeds that have it: the mean, its bootstrap interval, how many are above 0."""

    mean: float
    low: float
    high: float
    improved: int
    seeds: int

    def excludes(self, zero: float = 0) -> bool:
        """Whether the interval does; one value alone has none."""
        return self.seeds > 1 and (self.low > zero or self.high < zero)

    @property
    def above(self) -> bool:
        return self.mean > 0 and self.excludes()

    def text(self, decimals: int = 1) -> str:
        if not self.seeds:
            return "–"
        mean, low, high = (f"{value:+.{decimals}f}" for value in self[:3])
        return f"{mean} [{low}, {high}] {self.improved}/{self.seeds}"


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


def student(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Student's t-interval of the mean; without end for fewer than two values."""
    if len(values) < 2:
        return -math.inf, math.inf
    array = np.array(values)
    half = t_quantile(level, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean() - half), float(array.mean() + half)


def t_quantile(level: float, freedom: int) -> float:
    """The t that |t| is below with probability `level`.

    With t = sqrt(freedom) tan(a), the density of a is as cos(a) ** (freedom - 1).
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(level * mass[-1], mass, angles))


def sign_flip(values: Sequence[float]) -> float:
    """Two-sided p-value of a mean of 0, over all ways to flip the signs of the values."""
    if not 0 < len(values) <= _FLIPPED:
        return math.nan
    signs = np.array(list(product((1, -1), repeat=len(values))))
    sums = np.abs(signs @ np.array(values))
    return float((sums >= sums[0] * (1 - 1e-9)).mean())


def paired(wanted: Contrast, levels: Levels, measure: str, factor: float = 1.0) -> list[float]:
    """A contrast of a measure, times `factor`: a value for each seed that has it in all rows."""
    columns = [levels[label] for label in wanted.parts]
    return [
        factor * sum(f * row[measure] for f, row in zip(wanted.parts.values(), rows, strict=True))
        for rows in zip(*columns, strict=True)
        if all(row is not None and measure in row for row in rows)
    ]


def contrast(
    wanted: Contrast, levels: Levels, measure: str, *, factor: float = 1.0, level: float = 0.95
) -> Difference:
    """The :func:`difference` of a contrast."""
    return difference(paired(wanted, levels, measure, factor), level=level)


def wilson(successes: float, total: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, correction = successes / total, z**2 / total
    middle = share + correction / 2
    half = z * math.sqrt(share * (1 - share) / total + correction / total / 4)
    return max(0.0, (middle - half) / (1 + correction)), min(
        1.0, (middle + half) / (1 + correction)
    )
