"""The parts that an experiment is made of: rows, contrasts of them, tables."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

from studies.safety_world.runner import Job, train_job
from studies.safety_world.train import Spec

#: Label -> the measures of each seed, None where the run failed.
Levels = dict[str, list[dict[str, Any] | None]]

#: The sets of queries whose mean is the measure ``held_out``.
HELD_OUT = ("harmful_topics", "harmful_wrappers", "benign_topics")


class Row(NamedTuple):
    """A line of a table: `against` names the rows whose difference with it is reported."""

    label: str
    spec: Callable[[int], Spec]
    against: tuple[str, ...] = ()


class Contrast(NamedTuple):
    """A sum of rows with factors that sum to 0: a difference, or a difference of differences.

    Attributes:
        added: after the plan was committed, before any final run.
    """

    label: str
    parts: dict[str, float]
    added: bool = False


@dataclass(frozen=True)
class Experiment:
    """A table: its rows, and what of them is compared.

    With `looks`, a row is one for each of these epochs of its run.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    extra: tuple[Contrast, ...] = ()
    looks: tuple[int, ...] = ()

    @property
    def labels(self) -> list[str]:
        return [self.at(row.label, look) for row in self.rows for look in self.looks or (0,)]

    @staticmethod
    def at(label: str, look: int) -> str:
        return f"{label}, epoch {look}" if look else label

    def contrasts(self) -> list[Contrast]:
        made = [
            Contrast(
                f"{self.at(row.label, look)} − {other}",
                {self.at(row.label, look): 1.0, self.at(other, look): -1.0},
            )
            for row in self.rows
            for look in self.looks or (0,)
            for other in row.against
        ]
        return [*made, *self.extra]

    def identity(self, contrast: Contrast) -> Hashable:
        """Equal for contrasts of the same runs, whichever tables they stand in.

        A run of many epochs at an earlier one is the run of so many.
        """
        runs = {
            self.at(row.label, look): replace(row.spec(0), epochs=look, looks=())
            if look
            else row.spec(0)
            for row in self.rows
            for look in self.looks or (0,)
        }
        return frozenset((runs[label], factor) for label, factor in contrast.parts.items())

    def levels(
        self, seeds: Sequence[int], result: Callable[[Job], dict[str, Any] | None]
    ) -> Levels:
        """The measures of every row, ``held_out`` with them."""
        found: Levels = {label: [] for label in self.labels}
        for row in self.rows:
            for seed in seeds:
                whole = result(train_job(row.spec(seed)))
                for look in self.looks or (0,):
                    part = whole["looks"][str(look)] if whole and look else whole
                    if part:
                        part = part | {"held_out": fmean(part[name] for name in HELD_OUT)}
                    found[self.at(row.label, look)].append(part)
        return found
