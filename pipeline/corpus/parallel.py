"""Map a function over items on all cores, with results in the order of the items."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pipeline.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_ITEMS_AHEAD = 3


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Map in `workers` processes, or in this process if `workers` is 1.

    Reads at most a few items per worker ahead of the results taken, so neither items nor results pile up in memory.
    Raises `UserError` if a process is killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > _ITEMS_AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {workers} worker processes was killed, perhaps for lack of memory; free some, and run it again"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _end_with_parent() -> None:
    """End this worker when its parent is killed; without this it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
