"""What a stage's process owes to those around it: it ends when told to or with its DVC, and alone writes its folder."""

import math
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
"""Whoever ends a group of processes may tell each of them more than once."""
STAGE_VARIABLE = "DVC_STAGE"
"""DVC sets it for the commands that it runs."""
SHELLS = {"ash", "bash", "busybox", "dash", "fish", "ksh", "sh", "zsh"}
WATCH_S = 0.25
LOCK_SUFFIX = ".lock"
LOCK_WAIT_S = 10
"""For one that was told to end: the system clears its memory away first, and lets go of the lock last."""


@contextmanager
def stage_process(out: Path) -> Iterator[None]:
    """The frame of a stage that writes `out`: it ends with its DVC, and no other process writes there meanwhile.

    Its end comes wherever it is: what is half-written lies under a temporary name, and the next one removes it.
    Raises `UserError` where another is at work.
    """
    end_with_dvc()
    with only_writer(out, LOCK_WAIT_S):
        yield


@contextmanager
def only_writer(folder: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock of a folder, a file beside it. Raises `UserError` where another process still does after `wait_s`.

    The system lets go of it however a process ends; the file stays, and says nothing.
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
    """Send this stage SIGTERM when the DVC that runs it is gone, however it went.

    A stage that a person started by hand may outlive the shell.
    """
    if os.environ.get(STAGE_VARIABLE):
        threading.Thread(target=_end_after, args=(_runners(),), daemon=True).start()


def _runners() -> list[int]:
    """The process that started this one, and where that is a shell, the one that started the shell.

    DVC runs a command through a shell, and some shells, such as Debian's sh, stay while it runs. A system's call for
    the end of the parent would tell of the shell's end alone, and that lives on without DVC.
    """
    try:
        parent = psutil.Process(os.getppid())
        return [parent.pid, parent.ppid()] if parent.name() in SHELLS else [parent.pid]
    except psutil.NoSuchProcess:
        return []


def _end_after(runners: list[int]) -> None:
    # A process whose parent ends is handed on to another at once, whether or not anybody has asked for its result.
    while _runners() == runners:
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def termination_noted() -> Iterator[threading.Event]:
    """Let SIGTERM set the event instead of ending the process; another one, some seconds later, ends it."""
    asked = threading.Event()
    first_s = math.inf

    def note(number: int, frame: object) -> None:
        nonlocal first_s
        now_s = time.monotonic()
        first_s = min(first_s, now_s)
        asked.set()
        if now_s - first_s > ONE_REQUEST_S:
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
