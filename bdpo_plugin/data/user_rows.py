"""The datasets of the user that a run's rows are made of, for those who look at its scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset


class Source(NamedTuple):
    """One dataset of the user.

    Attributes:
        rows: as they were loaded.
        made: what the host made of each row, in the same order.
        file: the one local file that the rows are from, if they are from one.
    """

    rows: Dataset
    made: Any
    file: Path | None = None


_recording: ContextVar[list[Source] | None] = ContextVar("the user's datasets", default=None)


@contextmanager
def recording_sources() -> Iterator[list[Source]]:
    """While it lasts, the datasets that the rows of a B-DPO run are made of, in their order."""
    seen: list[Source] = []
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether somebody wants to see the scores of the run, and not to train."""
    return _recording.get() is not None


def record_source(rows: Any, made: Any) -> None:
    """Note a dataset, and what the host made of it, where somebody watches."""
    if (seen := _recording.get()) is not None:
        # as the releases of datasets that the hosts pin have it
        files = [Path(name) for name in rows.info.download_checksums or {}]
        one = len(files) == 1 and files[0].is_file()
        seen.append(Source(rows, made, files[0] if one else None))
