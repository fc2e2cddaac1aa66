"""Writes files atomically. Standard library only."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Yields the path of a temporary file beside `file` to write to, and renames it to `file` at
    the end. A process that is killed, or fails, leaves the old file or the new one."""
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")  # several processes may share a folder
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Writes a text file as :func:`written_whole` does."""
    with written_whole(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
