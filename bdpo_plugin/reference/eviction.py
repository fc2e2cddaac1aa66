"""Stored scores that nobody has used for long are removed, and the oldest where there are many."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bdpo_plugin.reference.store import ASIDE

DAY = 24 * 3600.0

#: The scores of a reference that no run has used for so long are removed, in seconds.
AGE = 90 * DAY
#: While all stored scores take more than this, in bytes, the least recently used go.
SIZE = 2 * 2**30
#: What was used within this time, in seconds, is never removed: a run may be at it.
IN_USE = 1 * DAY

_FOLDER = re.compile(rf"[0-9a-f]{{32}}({re.escape(ASIDE)}[0-9a-f]{{8}})?")
_FILE = re.compile(
    r"[0-9a-f]{32}(-[0-9a-f]{8})?\.parquet(\.damaged)?|\.[0-9a-f]{32}\.tmp"  # those of a store
)


class _Stored(NamedTuple):
    """The scores of one reference.

    Attributes:
        used: when a run last used them, in seconds since the epoch.
        size: bytes.
    """

    used: float
    size: int
    folder: Path
    files: list[Path]


def evict(cache: Path, keep: Path | None = None) -> None:
    """Remove from a cache directory what is beyond :data:`AGE`, and the least recently used beyond
    :data:`SIZE`; never what is in use, nor a folder with anything in it that no store has written.

    Whoever begins to use scores at the moment at which they go computes them again.

    Args:
        keep: a folder that stays, whatever its age.
    """
    now = time.time()
    stored = sorted(_stored(cache))
    size = sum(one.size for one in stored)
    for one in stored:
        old = now - one.used > AGE
        if one.folder == keep or now - one.used < IN_USE or not (old or size > SIZE):
            continue
        with suppress(OSError):
            if one.folder.stat().st_mtime != one.used:
                continue  # somebody has begun to use it
            for file in one.files:
                file.unlink(missing_ok=True)
            one.folder.rmdir()
            size -= one.size


def _stored(cache: Path) -> Iterator[_Stored]:
    """The folders that stores have made, and that this user may change."""
    with suppress(OSError):
        for folder in list(cache.iterdir()):
            with suppress(OSError):
                if not _FOLDER.fullmatch(folder.name) or folder.is_symlink():
                    continue
                used = folder.stat().st_mtime
                files = list(folder.iterdir())
                if all(_FILE.fullmatch(file.name) and not file.is_dir() for file in files):
                    size = sum(file.lstat().st_size for file in files)
                    yield _Stored(used, size, folder, files)
