"""Many jobs in a few processes, which are replaced now and then."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import islice
from typing import Any, TypeVar

Call = TypeVar("Call", bound="tuple[Any, ...]")
Result = TypeVar("Result")


def finished(
    function: Callable[..., Result],
    calls: Iterable[Call],
    *,
    processes: int,
    lifetime: int,
    begin: Callable[[], object] | None = None,
) -> Iterator[tuple[Call, Future[Result]]]:
    """Each call as it ends.

    Args:
        calls: arguments of `function`, each tuple made when its pool begins.
        lifetime: calls of one pool of processes, as trainers leave memory behind. (The pool's own
            way to replace its processes, `max_tasks_per_child`, can hang in Python 3.11.)
        begin: what each process does first.

    Yields:
        the arguments, and the future: its exception is that of the function, or says that the
        process died, which takes the other calls of its pool with it.
    """
    calls = iter(calls)
    spawn = multiprocessing.get_context("spawn")
    while some := [*islice(calls, lifetime)]:
        with ProcessPoolExecutor(processes, spawn, begin) as pool:
            futures = {pool.submit(function, *call): call for call in some}
            for future in as_completed(futures):
                yield futures[future], future
