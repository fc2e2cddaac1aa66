"""A lock on an output folder, which prevents two runs from writing to the same folder. The scorer
of a run takes it."""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path

import filelock

from bdpo_plugin.output.tables import print_warning
from bdpo_plugin.reference.store import default_cache_dir
from bdpo_plugin.settings import BDPOError


def lock_output(folder: str | Path) -> filelock.BaseFileLock | None:
    """Locks an output folder for this process. The lock is held as long as the object that this
    function returns, which all trainers of the process share, or until the process ends.

    The lock file is in the user's cache directory and named by a digest, so that the output folder,
    which may be uploaded, contains nothing about this machine. Therefore the lock does not work
    between two users, nor between two machines that share the folder over a network.

    Returns:
        The lock. None, after a warning, if the cache directory cannot be written or its file system
        has no locks.

    Raises:
        BDPOError: Another process holds the lock.
    """
    folder = Path(folder).resolve()
    try:
        locks = default_cache_dir() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        # machines may share a home directory, but not the disk of their output
        named = f"{socket.gethostname()}:{folder}".encode(errors="surrogateescape")
        file = locks / hashlib.blake2b(named, digest_size=16).hexdigest()
        holder = file.with_suffix(".txt")
        lock = filelock.FileLock(file.with_suffix(".lock"), thread_local=False, is_singleton=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        who = ""
        with suppress(OSError):
            who = f" ({holder.read_text(encoding='utf-8').strip()})"
        raise BDPOError(
            f"Another B-DPO run has the output folder {folder}{who}: their checkpoints would "
            "overwrite each other. Give this run another folder, or stop the other run."
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        print_warning(
            f"The output folder {folder} cannot be locked ({error}): see to it that no other run "
            "writes to it."
        )
        return None
    with suppress(OSError):  # only the error message needs this file
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
    return lock
