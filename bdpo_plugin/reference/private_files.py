"""Writes files and folders that only their user can read, atomically and durably. The store of the
scores uses it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from bdpo_plugin.atomic import written_whole


def write_private(file: Path, content: bytes) -> None:
    """Writes a file that only the user can read, atomically and so that it survives a power
    failure."""
    with written_whole(file) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            _sync(descriptor)
    _sync_folder(file.parent)


def make_private(folder: Path) -> None:
    """Creates a folder that only the user can enter, and its missing parents; leaves an existing
    folder as it is."""
    for path in reversed([folder, *folder.parents]):
        if not path.exists():
            with suppress(FileExistsError):  # made by another process, or a dangling link
                path.mkdir(mode=0o700)
                _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Flushes a file or folder to the disk, on file systems that support it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
