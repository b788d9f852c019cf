"""Folders that take long to make: made once per run of the tests, and read by all of its processes.

pytest-xdist gives every worker its own session fixtures, but one parent to the workers' temporary folders. The first
worker that needs a folder makes it there under a lock; the others wait for it.
"""

import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.files import digest_of

_root: Path | None = None
_used: set[Path] = set()


def set_root(root: Path) -> None:
    """Make the shared folders of this process under `root`, which all workers of a run must name."""
    global _root
    _root = root
    _used.clear()


def shared_folder(name: str, build: Callable[[Path], object]) -> Path:
    """Return the folder `name`, filled by `build(folder)` if no worker has done so yet. Do not write to it.

    If `build` fails, its error fails every test of every worker that needs the folder. A folder that a killed worker
    left unfinished is made again.
    """
    assert _root is not None, "the fixture `shared_root` sets it"
    folder = _root / name
    whole, failed = _whole_file(folder), folder.with_name(f"{name}.failed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if failed.exists():
            pytest.fail(f"the shared folder {name} could not be made:\n{failed.read_text()}", pytrace=False)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                build(folder)
            except BaseException:  # A stage ends with SystemExit, and a timeout with pytest's own exception.
                failed.write_text(traceback.format_exc())
                raise
            whole.write_text(digest_of([folder]))
    _used.add(folder)
    return folder


def check_unchanged() -> None:
    """Fail if a test of any worker has written to a shared folder that this worker used."""
    changed = [folder.name for folder in sorted(_used) if digest_of([folder]) != _whole_file(folder).read_text()]
    if changed:
        pytest.fail(f"tests wrote to what they share: {', '.join(changed)}; let them copy it first", pytrace=False)


def _whole_file(folder: Path) -> Path:
    """The file that says that a folder is whole: it holds the digest of the folder's files."""
    return folder.with_name(f"{folder.name}.sha256")
