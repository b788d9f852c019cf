"""Map a function over items on all cores, or on a Ray cluster, with results in the order of the items."""

import logging
import multiprocessing
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.params.prepare import Executor

Item = TypeVar("Item")
Result = TypeVar("Result")

RAY_ADDRESS = "RAY_ADDRESS"
"""The variable with the address of the Ray cluster; without it, Ray runs on this machine alone."""
RAY_PORT = 6379
ANSWER_S = 10
_ITEMS_AHEAD = 3


class MapInOrder(Protocol):
    """Maps a function that can be pickled over items, and yields the results in the order of the items."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]: ...


@contextmanager
def open_executor(executor: Executor, workers: int) -> Iterator[MapInOrder]:
    """Yield what maps on an executor. `workers` is the number of processes of this machine; Ray uses its own number.

    Raises `UserError` if Ray is not installed, or its cluster does not answer.
    """
    if executor == "local":
        yield partial(map_in_order, workers=workers)
        return
    with _ray_cluster(workers) as cores:
        yield partial(_map_on_ray, workers=cores)


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


def _map_on_ray(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Map as `map_in_order` does, on the cores of a Ray cluster; a task of a worker that dies runs again elsewhere."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    task: Any = ray.remote(_call)
    shared = ray.put(function)
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(task.remote(shared, item))
            if len(pending) > _ITEMS_AHEAD * workers:
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, RayError):
            raise cause from error  # what the function raised
        raise UserError(f"prepare.executor: Ray: {str(cause).splitlines()[0]}; mend that, and run it again") from error
    finally:
        for result in pending:
            ray.cancel(result)


@contextmanager
def _ray_cluster(workers: int) -> Iterator[int]:
    """Connect to the cluster that `RAY_ADDRESS` names, or start Ray here with `workers` cores; yield their number."""
    try:
        import ray
    except ImportError as error:
        raise UserError("prepare.executor: Ray is not installed; run pip install --editable '.[ray]'") from error
    address = os.environ.get(RAY_ADDRESS)
    options: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
    if address:
        options = {"address": address, "runtime_env": {"py_modules": [str(Path(__file__).parents[1])]}}
    try:
        if address and address != "auto":
            # Ray itself would try for minutes.
            parts = urlsplit(address if "://" in address else f"ray://{address}")
            socket.create_connection((parts.hostname or "", parts.port or RAY_PORT), ANSWER_S).close()
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{RAY_ADDRESS}: no cluster answers at {address} ({reason}); start it, or correct it"
        ) from error
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield max(1, int(resources.get("CPU", 1)))
    finally:
        ray.shutdown()


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


def _end_with_parent() -> None:
    """End this worker when its parent is killed; without this it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
