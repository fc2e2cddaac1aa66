"""Records the user's datasets from which a run makes its rows, for commands that show scores beside
the user's rows. The hosts call :func:`record_source`."""

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
        rows: the rows as loaded.
        made: the host's result for each row, in the same order.
        file: the local file that all rows are from; None if there is no such file.
    """

    rows: Dataset
    made: Any
    file: Path | None = None


_recording: ContextVar[list[Source] | None] = ContextVar("the user's datasets", default=None)


@contextmanager
def recording_sources() -> Iterator[list[Source]]:
    """Records in this context the datasets from which a B-DPO run makes its rows, in order."""
    seen: list[Source] = []
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether sources are recorded: the run then only shows scores and does not train."""
    return _recording.get() is not None


def record_source(rows: Any, made: Any) -> None:
    """Records a dataset and the host's result for its rows, inside :func:`recording_sources`."""
    if (seen := _recording.get()) is not None:
        # the releases of datasets that the hosts pin keep the file names here
        files = [Path(name) for name in rows.info.download_checksums or {}]
        one = len(files) == 1 and files[0].is_file()
        seen.append(Source(rows, made, files[0] if one else None))
