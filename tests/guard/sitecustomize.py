"""Notes what a process writes, and keeps it from the network: for commands that only look.

In this process by :func:`watching`. A new process, and all that it starts, is watched where this
folder is the first of PYTHONPATH and BDPO_GUARD names a file for the notes. Python's own functions
are seen; what compiled code writes is seen in the folders that a test compares before and after.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NETWORK = {
    "socket.connect": lambda args: args[1],
    "socket.sendto": lambda args: args[1],
    "socket.getaddrinfo": lambda args: args[0],
    "socket.gethostbyname": lambda args: args[0],
}
_HERE = ("127.", "localhost", "::1", "0.0.0.0")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
#: Where a note goes; None where nobody watches.
_note = None


def _look(event: str, args: tuple) -> None:
    if _note is None:
        return
    if event in _NETWORK:
        place = _NETWORK[event](args)
        host = place[0] if isinstance(place, tuple) else place
        host = host.decode() if isinstance(host, bytes) else str(host)
        if host.startswith((*_HERE, "/")) or host in ("", "None"):  # this machine, a Unix socket
            return
        _note(f"network: {event} {place}")
        raise OSError(f"The guard lets nobody ask {host}.")
    path = None
    if event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
        path = args[0]
    elif event in ("os.mkdir", "os.symlink", "os.link", "os.rename"):
        path = args[0] if event == "os.mkdir" else args[1]
    if isinstance(path, str | bytes | os.PathLike):
        _note(f"writes: {os.path.abspath(os.fsdecode(path))}")


_added = False


@contextmanager
def watching() -> Iterator[list[str]]:
    """While it lasts, what this process writes or asks of the network, in words."""
    global _note, _added
    if not _added:
        sys.addaudithook(_look)  # which nothing takes out again
        _added = True
    notes: list[str] = []
    _note = notes.append
    try:
        yield notes
    finally:
        _note = None


def _watch_this_process(file: str) -> None:
    global _note
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _note = lambda words: os.write(descriptor, f"{words}\n".encode())  # noqa: E731
    sys.addaudithook(_look)


if __name__ == "sitecustomize":
    if os.environ.get("BDPO_GUARD"):
        _watch_this_process(os.environ["BDPO_GUARD"])
    # the next file of this name, which would run without this one
    for _folder in sys.path:
        _next = Path(_folder, "sitecustomize.py")
        if _next.is_file() and not _next.samefile(__file__):
            exec(compile(_next.read_text(), str(_next), "exec"), {"__name__": "sitecustomize"})
            break
