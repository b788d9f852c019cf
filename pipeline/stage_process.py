"""A stage's process: stops on signals or when its DVC dies, and holds an exclusive lock on its output folder."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pipeline.errors import UserError

ONE_REQUEST_S = 3
"""Equal signals within this time count as one: a group of processes may get each more than once."""
STAGE_VARIABLE = "DVC_STAGE"
"""The variable that DVC sets for the commands that it runs."""
SHELLS = {"ash", "bash", "busybox", "dash", "fish", "ksh", "sh", "zsh"}
WATCH_S = 0.25
LOCK_SUFFIX = ".lock"
LOCK_WAIT_S = 10
"""The wait for a process that is ending: the system frees its memory first, and releases the lock last."""


@contextmanager
def stage_process(out: Path) -> Iterator[None]:
    """Run a stage that writes `out`: it ends when its DVC dies, and no other process writes there meanwhile.

    It may die at any point: partial output has a temporary name, and the next run removes it. Raises `UserError` if
    another process is writing.
    """
    end_with_dvc()
    with only_writer(out, LOCK_WAIT_S):
        yield


@contextmanager
def only_writer(folder: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock of a folder, a file next to it. Raises `UserError` if another process holds it after `wait_s`.

    The OS releases the lock when the process ends. The lock file stays; its presence means nothing.
    """
    lock_file = folder.with_name(folder.name + LOCK_SUFFIX)
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(lock_file).acquire(timeout=wait_s)
    except Timeout as error:
        raise UserError(f"{lock_file}: another process writes to {folder}; wait for it, or end it") from error
    with lock:
        yield


def end_with_dvc() -> None:
    """Send this stage SIGTERM when the DVC that runs it has ended for any reason.

    A stage that was started by hand may outlive its shell.
    """
    if os.environ.get(STAGE_VARIABLE):
        threading.Thread(target=_end_after, args=(_runners(),), daemon=True).start()


def _runners() -> list[int]:
    """Return the ids of the process that started this one and, if that is a shell, of the shell's parent.

    DVC runs a command through a shell, and some shells, such as Debian's sh, stay while it runs. A system call that
    reports the end of the parent would report only the shell's end, and the shell survives DVC.
    """
    try:
        parent = psutil.Process(os.getppid())
        return [parent.pid, parent.ppid()] if parent.name() in SHELLS else [parent.pid]
    except psutil.NoSuchProcess:
        return []


def _end_after(runners: list[int]) -> None:
    # If its parent ends, a process gets another parent at once, whether or not anyone has waited for the parent.
    while _runners() == runners:
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def note_termination() -> Iterator[threading.Event]:
    """Let SIGTERM and SIGINT set the event; only the same one again, some seconds later, ends the process."""
    asked = threading.Event()
    first_s: dict[int, float] = {}

    def note(number: int, frame: object) -> None:
        now_s = time.monotonic()
        asked.set()
        if now_s - first_s.setdefault(number, now_s) > ONE_REQUEST_S:
            signal.signal(number, before[signal.Signals(number)])
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
