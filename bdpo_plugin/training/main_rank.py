"""What the main process does for all ranks of a run."""

from __future__ import annotations

from collections.abc import Callable

from bdpo_plugin.reference.distributed import gathered
from bdpo_plugin.settings import BDPOError


def by_main(main: bool, act: Callable[[], None], what: str) -> None:
    """Has the main process do something that can fail, such as to write a file; to be called in
    every rank. Where it fails, all ranks stop: none is left waiting for the main one.

    Args:
        main: whether this is the main process.
        act: what is to be done.
        what: the same in words, for the message.

    Raises:
        BDPOError: in each rank, where it failed.
    """
    error: Exception | None = None
    if main:
        try:
            act()
        except Exception as raised:  # whatever it is: the others wait
            error = raised
    message = error and (str(error) if isinstance(error, BDPOError) else _failed(what, error))
    for rank, told in enumerate(gathered(message)):
        if told and main:
            raise BDPOError(told) from error
        if told:
            raise BDPOError(f"Rank {rank} of this run could not go on. {told}")


def _failed(what: str, error: Exception) -> str:
    return (
        f"This run could not {what} ({type(error).__name__}: {error}). Scores that have been "
        "computed are kept in the cache: make room, or make the output folder writable, and start "
        "again."
    )
