"""Folders on an object store as a stage's input or output: a URL that fsspec reads, such as s3://bucket/folder."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from fsspec import Callback
from upath import UPath

from pipeline.errors import UserError
from pipeline.files import short_digest, size_of
from pipeline.progress import progress

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "azure", "abfs": "azure", "abfss": "azure"}
"""The extra of this project with the library of each kind of store."""
LAST_FILE = "report.json"
"""The file that is copied last, so that a folder that has it is whole."""


class _Copied(Callback):
    """Moves a bar as the bytes of a file are copied."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self._bar = bar

    def relative_update(self, inc: int = 1) -> None:
        self._bar.update(inc)


def find_folder(location: str) -> Path:
    """Return a folder of this machine, or one on an object store, which has the methods of a `Path` for reading.

    Raises `UserError` if the store does not answer, refuses, or its library is not installed.
    """
    if not _is_url(location):
        return Path(location)
    with name_store(location):
        folder = _open(location)
        folder.exists()
    return cast(Path, folder)


def local_folder(location: str, parent: str | None) -> Path:
    """Return the folder to write what `upload` then copies: the location itself if it is on this machine.

    Else it is in `parent`, by default where the system keeps temporary files, with a name of its own.
    """
    if not _is_url(location):
        return Path(location)
    name = location.rstrip("/").rpartition("/")[2]
    return Path(parent or tempfile.gettempdir(), f"{name}-{short_digest(location)}")


def upload(folder: Path, location: str) -> None:
    """Copy the files of a local folder to their location, and remove them here; nothing if that is where they are.

    A file on an object store appears whole. `LAST_FILE` is removed first and copied last.
    """
    if not _is_url(location):
        return
    files = sorted(folder.iterdir(), key=lambda file: file.name == LAST_FILE)
    with name_store(location):
        target = _open(location)
        (target / LAST_FILE).unlink(missing_ok=True)
        with progress(description="copying", total=size_of(files), unit="B", unit_scale=True) as bar:
            for file in files:
                target.fs.put_file(str(file), (target / file.name).path, callback=_Copied(bar))
    shutil.rmtree(folder)


@contextmanager
def name_store(location: str) -> Iterator[None]:
    """Turn errors of the store or its library into a `UserError` that names the location, if that is on a store."""
    try:
        yield
    except ImportError as error:
        extra = EXTRAS.get(location.partition("://")[0])
        if extra is None:
            raise
        raise UserError(f"{location}: needs a library that is not installed; run pip install '.[{extra}]'") from error
    except Exception as error:
        is_own = isinstance(error, UserError) or getattr(error, "filename", None)
        is_fault = type(error).__module__ == "builtins" and not isinstance(error, OSError)
        if not _is_url(location) or is_own or is_fault:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{location}: {reason:.300}; correct the address, the credentials or the network") from error


def _open(location: str) -> UPath:
    try:
        return UPath(location)
    except ValueError as error:
        raise UserError(f"{location}: {error}; use one of those of fsspec, such as s3://, gs:// or abfs://") from error


def _is_url(location: str) -> bool:
    return "://" in location
