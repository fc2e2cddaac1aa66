"""Filters out the pairs of a stream that cannot be trained on, counts them, and reports them to the
user. The trainers of the hosts use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from bdpo_plugin.data.pairs import PROBLEMS, Pair, check_pairs
from bdpo_plugin.output.tables import print_problems

_KINDS = tuple(PROBLEMS)


class StreamFilter:
    """The predicates for `IterableDataset.filter` on the rows of a stream.

    Each process prints each kind of problem once, when it first finds it. The counts of all workers
    of a data loader are in shared memory, where the main process can read them.

    Args:
        pair: returns for a row the pair after truncation, and its numbers of response tokens
            (chosen, rejected) before truncation.
        position: the column with the position of a row in the stream.
    """

    def __init__(
        self,
        name: str,
        pair: Callable[[Mapping[str, Any]], tuple[Pair, tuple[int, int]]],
        *,
        bos: int | None,
        is_blank: Callable[[np.ndarray], bool],
        workers: int = 0,
        position: str | None = None,
    ) -> None:
        self.name = name
        self._pair = pair
        self._bos, self._is_blank = bos, is_blank
        self._position = position
        # (workers, 1 + kinds): the rows read, and those with each problem
        self._counts = torch.zeros(max(1, workers), 1 + len(_KINDS), dtype=torch.int64)
        self._counts.share_memory_()
        self._told: set[str] = set()

    def has_responses(self, row: Mapping[str, Any]) -> bool:
        """Whether each response of a row that is not yet tokenised has a message."""
        empty = [] in (row["chosen"], row["rejected"])
        if empty:
            self._count(row, ["empty"])
        return not empty

    def is_trainable(self, row: Mapping[str, Any]) -> bool:
        """Whether a tokenised row can be trained on."""
        pair, lengths = self._pair(row)
        report = check_pairs(
            [pair], self.name, lengths=[lengths], bos=self._bos, is_blank=self._is_blank
        )
        self._count(row, report.rows)
        return not report.dropped

    def _count(self, row: Mapping[str, Any], problems: Iterable[str]) -> None:
        worker = get_worker_info()
        counts = self._counts[worker.id % len(self._counts) if worker else 0]
        counts[0] += 1
        for problem in problems:
            counts[1 + _KINDS.index(problem)] += 1
            if problem not in self._told:
                self._told.add(problem)
                words, kept = PROBLEMS[problem]
                where = f" (row {row[self._position]})" if self._position else ""
                fate = "kept" if kept else "dropped"
                print_problems(
                    [
                        f"a pair of the {self.name} data, a stream{where}: {words} ({fate}; such "
                        "pairs are counted, and reported at the end of the training)"
                    ]
                )

    def start_counting(self) -> None:
        """Resets the counts."""
        self._counts.zero_()

    def summary(self, accelerator: Accelerator) -> list[str]:
        """Returns one line for each problem of the rows read. Call it in every rank."""
        counts = self._counts.sum(0).to(accelerator.device)
        read, *found = accelerator.reduce(counts, reduction="sum").tolist()
        return [
            f"{count} of the {read} pairs read from the {self.name} data, a stream: "
            f"{words} ({'kept' if kept else 'dropped'})"
            for count, (words, kept) in zip(found, PROBLEMS.values(), strict=True)
            if count
        ]


class ReportStreams(TrainerCallback):
    """Prints at the end of training the problems found in the streams.

    Args:
        filters: the filters of its streams; the caller may add filters to the list later.
    """

    def __init__(self, accelerator: Accelerator, filters: list[StreamFilter]) -> None:
        self.accelerator = accelerator
        self.filters = filters

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for stream in self.filters:
            lines = stream.summary(self.accelerator)
            if state.is_world_process_zero:
                print_problems(lines)
