"""A lock on an output folder, which keeps two runs from writing into one."""

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
    """Held as long as this object lives; all trainers of a process share it.

    The operating system lets go of it when the process ends, however it ends. Its file is in the
    user's cache directory, named by a digest, so that the output folder, which may be uploaded,
    has nothing of this machine in it. So two users have two locks, and so have two machines that
    share the folder over a network. Where the cache directory cannot be written or its file system
    has no locks, the run goes on without, and says so.

    Raises:
        BDPOError: another process has the lock.
    """

    _of_process: ClassVar[WeakValueDictionary[tuple[int, Path], OutputLock]] = WeakValueDictionary()

    @classmethod
    def take(cls, folder: str | Path) -> OutputLock:
        """The lock of a folder, for this process."""
        path = Path(folder).resolve()
        key = (os.getpid(), path)  # a forked child has its parent's dictionary, and not its locks
        if (held := cls._of_process.get(key)) is None:
            held = cls._of_process[key] = cls(path)
        return held

    def __init__(self, folder: Path) -> None:
        try:
            locks = default_cache_dir() / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            # machines may share a home directory, and not the disk of their output
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
                "overwrite each other. Give this run a folder of its own, or end the other one."
            ) from None
        except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
            print_warning(
                f"The output folder {folder} cannot be locked ({error}): see to it that no other "
                "run writes to it."
            )
            return
        with suppress(OSError):  # it is for the message alone
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
