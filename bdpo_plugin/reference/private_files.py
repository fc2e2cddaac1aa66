"""Files and folders for their user alone, whole or not there, that survive a loss of power."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path


def write_private(file: Path, content: bytes) -> None:
    """Write a whole file or none, for the user alone, so that it survives a loss of power."""
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            _sync(descriptor)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(file.parent)


def make_private(folder: Path) -> None:
    """Make a folder that only the user may enter, and those above it; one that is there stays."""
    for path in reversed([folder, *folder.parents]):
        if not path.exists():
            with suppress(FileExistsError):  # another process was faster, or a link leads nowhere
                path.mkdir(mode=0o700)
                _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Have it on the disk, on file systems that know what that is."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
