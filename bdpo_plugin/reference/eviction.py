"""Removes stored scores that no run has used for a long time, and the least recently used ones if
the cache is too large. Runs call it at the end of the reference pass."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bdpo_plugin.reference.store import ASIDE

DAY = 24 * 3600.0

#: The scores of a reference are removed if no run has used them for this time, in seconds.
AGE = 90 * DAY
#: While all stored scores take more than this, in bytes, the least recently used are removed.
SIZE = 2 * 2**30
#: Scores used within this time, in seconds, are never removed: a run may still be using them.
IN_USE = 1 * DAY

_FOLDER = re.compile(rf"[0-9a-f]{{32}}({re.escape(ASIDE)}[0-9a-f]{{8}})?")
_FILE = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{8})?\.parquet|\.[0-9a-f]{32}\.tmp")


def evict(cache: Path, keep: Path | None = None) -> None:
    """Removes scores older than :data:`AGE` from a cache directory, and the least recently used
    ones while the directory is larger than :data:`SIZE`.

    It never removes `keep`, scores in use, nor a folder with a file that no store has written. A
    run that begins to use scores in the moment of their removal computes them again.
    """
    now = time.time()
    stored = sorted(_stored(cache))
    total = sum(size for _, _, size, _ in stored)
    for used, folder, size, files in stored:
        if folder == keep or now - used < IN_USE or (now - used <= AGE and total <= SIZE):
            continue
        with suppress(OSError):
            if folder.stat().st_mtime != used:
                continue  # a run has begun to use it
            for file in files:
                file.unlink(missing_ok=True)
            folder.rmdir()
            total -= size


def _stored(cache: Path) -> Iterator[tuple[float, Path, int, list[Path]]]:
    """Yields the folders that stores have written and that this user can access: the time of the
    last use by a run, the folder, the bytes of its files, and these."""
    with suppress(OSError):
        for folder in list(cache.iterdir()):
            with suppress(OSError):
                if not _FOLDER.fullmatch(folder.name) or folder.is_symlink():
                    continue
                used = folder.stat().st_mtime
                files = list(folder.iterdir())
                if all(_FILE.fullmatch(file.name) and not file.is_dir() for file in files):
                    size = sum(file.lstat().st_size for file in files)
                    yield used, folder, size, files
