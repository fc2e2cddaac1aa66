"""Pairs of a stream that cannot teach: filtered out as they come, counted, and told."""

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
    """What `IterableDataset.filter` is to call on the rows of a stream.

    Each kind of problem is told once, by the process that meets it first; the counts of all the
    workers of a data loader are kept where the main process sees them.

    Args:
        name: of the stream.
        pair: a row -> the pair that training will see, after truncation, and the response tokens
            (chosen, rejected) that it has before.
        bos: id of the BOS token.
        is_blank: whether the tokens of a response are no text.
        workers: of the data loader.
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

    def has_messages(self, row: Mapping[str, Any]) -> bool:
        """Whether a row, before it is tokenised, has a message in each of its responses."""
        empty = [] in (row["chosen"], row["rejected"])
        if empty:
            self._count(row, ["empty"])
        return not empty

    def teaches(self, row: Mapping[str, Any]) -> bool:
        """Whether a tokenised row can teach."""
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
                words, teaches = PROBLEMS[problem]
                where = f" (row {row[self._position]})" if self._position else ""
                fate = "kept" if teaches else "dropped"
                print_problems(
                    [
                        f"a pair of the {self.name} data, a stream{where}: {words} ({fate}; such "
                        "pairs are counted, and told at the end of the training)"
                    ]
                )

    def start_counting(self) -> None:
        """Forget what has been read so far."""
        self._counts.zero_()

    def summary(self, accelerator: Accelerator) -> list[str]:
        """One line for each problem of the rows read; to be called in every rank."""
        counts = self._counts.sum(0).to(accelerator.device)
        read, *found = accelerator.reduce(counts, reduction="sum").tolist()
        return [
            f"{count} of the {read} pairs read from the {self.name} data, a stream: "
            f"{words} ({'kept' if teaches else 'dropped'})"
            for count, (words, teaches) in zip(found, PROBLEMS.values(), strict=True)
            if count
        ]


class TellStreams(TrainerCallback):
    """Tells at the end of training what was filtered out of the streams.

    Args:
        accelerator: of the run.
        filters: of its streams; more may be added.
    """

    def __init__(self, accelerator: Accelerator, filters: list[StreamFilter]) -> None:
        self.accelerator = accelerator
        self.filters = filters

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for stream in self.filters:
            lines = stream.summary(self.accelerator)
            if state.is_world_process_zero:
                print_problems(lines)
