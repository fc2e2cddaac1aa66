"""Runs an action in the main process and reports its failure to all ranks. The trainer mixin and
the scorer call it."""

from __future__ import annotations

from collections.abc import Callable

from bdpo_plugin.reference.distributed import gathered
from bdpo_plugin.settings import BDPOError


def by_main(main: bool, act: Callable[[], None], what: str) -> None:
    """Runs an action that can fail, such as writing a file, in the main process. Call it in every
    rank: if the action fails, all ranks stop, and none is left waiting for the main one.

    Raises:
        BDPOError: In every rank, if the action failed.
    """
    error: Exception | None = None
    if main:
        try:
            act()
        except Exception as raised:  # any exception, because the other ranks are waiting
            error = raised
    message = error and str(error)
    if error and not isinstance(error, BDPOError):
        message = (
            f"This run could not {what} ({type(error).__name__}: {error}). Scores that have been "
            "computed are kept in the cache: make room, or make the output folder writable, and "
            "start again."
        )
    for rank, told in enumerate(gathered(message)):
        if told and main:
            raise BDPOError(told) from error
        if told:
            raise BDPOError(f"Rank {rank} of this run could not go on. {told}")
