"""A lock on an output folder, which prevents two runs from writing to the same folder. The scorer
of a run takes it."""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

import filelock

from bdpo_plugin.output.tables import print_warning
from bdpo_plugin.reference.store import default_cache_dir
from bdpo_plugin.settings import BDPOError


class OutputLock:
    """A lock on an output folder, held as long as this object lives. All trainers of a process
    share it.

    The operating system releases the lock when the process ends, in whatever way. The lock file is
    in the user's cache directory and named by a digest, so that the output folder, which may be
    uploaded, contains nothing about this machine. Therefore the lock does not work between two
    users, nor between two machines that share the folder over a network. If the cache directory
    cannot be written, or its file system has no locks, the run continues without a lock and prints
    a warning.

    Raises:
        BDPOError: Another process holds the lock.
    """

    _of_process: ClassVar[WeakValueDictionary[tuple[int, Path], OutputLock]] = WeakValueDictionary()

    @classmethod
    def take(cls, folder: str | Path) -> OutputLock:
        """Returns the lock of a folder for this process; takes it if the process does not hold it.

        Raises:
            BDPOError: Another process holds the lock.
        """
        path = Path(folder).resolve()
        key = (os.getpid(), path)  # a forked child inherits this dictionary, but not the locks
        if (held := cls._of_process.get(key)) is None:
            held = cls._of_process[key] = cls(path)
        return held

    def __init__(self, folder: Path) -> None:
        try:
            locks = default_cache_dir() / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            # machines may share a home directory, but not the disk of their output
            named = f"{socket.gethostname()}:{folder}".encode(errors="surrogateescape")
            file = locks / hashlib.blake2b(named, digest_size=16).hexdigest()
            holder = file.with_suffix(".txt")
            self._lock = filelock.FileLock(file.with_suffix(".lock"), thread_local=False)
            self._lock.acquire(blocking=False)
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
                f"The output folder {folder} cannot be locked ({error}): see to it that no other "
                "run writes to it."
            )
            return
        with suppress(OSError):  # only the error message needs this file
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
