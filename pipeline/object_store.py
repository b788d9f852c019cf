"""Folders on an object store as a stage's input or output: an address that fsspec reads, such as s3://bucket/folder."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from fsspec import Callback
from upath import UPath

from pipeline.errors import UserError
from pipeline.files import own_name, size_of
from pipeline.progress import progress

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "azure", "abfs": "azure", "abfss": "azure"}
"""The extra of this project with the library of each kind of store."""
LAST_FILE = "report.json"
"""The file that is copied last, so that a folder that has it is whole."""
LOCAL_OUTPUTS = "out"
"""The folder where outputs for stores are written first, if no other is named."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LIBRARIES = ("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")


class _Copied(Callback):
    """Moves a bar as the bytes of a file are copied."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self._bar = bar
        self._begin = bar.n

    def call(self, hook_name: str | None = None, **options: object) -> None:
        self._bar.update(self._begin + self.value - self._bar.n)


def find_folder(location: str) -> Path:
    """Return a folder of this machine, or one on an object store, which has the methods of a `Path` for reading.

    Raises `UserError` if the store does not answer, refuses, or its library is not installed.
    """
    if not _is_address(location):
        return Path(location)
    with name_store_in_errors(location):
        folder = _open(location)
        folder.exists()
    return cast(Path, folder)


def find_output(location: str) -> Path:
    """Return a folder that `upload` copied, or one of this machine.

    Raises `UserError` as `find_folder` does, or if not all of it was copied.
    """
    folder = find_folder(location)
    if _is_address(location) and not (folder / LAST_FILE).is_file():
        raise UserError(f"{location}: has no {LAST_FILE}, which is copied last; run the stage that writes it again")
    return folder


def list_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, except hidden ones.

    Of this machine, raises `UserError` for what is no file, such as a link that leads nowhere or to a folder. On an
    object store, objects that only mark a folder are no files; raises `UserError` for names with empty parts.
    """
    if isinstance(folder, Path):
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir() and not path.is_symlink():
                yield from list_files(path)
            elif path.is_file():
                yield path
            else:
                raise UserError(f"{path}: not a file, or a link that leads to none; replace it by a copy, or remove it")
        return
    for name in folder.fs.find(folder.path):
        relative = name.removeprefix(folder.path.rstrip("/") + "/")
        if relative.endswith("/") or name.rstrip("/") == folder.path.rstrip("/"):
            continue
        parts = relative.split("/")
        if "" in parts:
            raise UserError(f"{folder}: {relative}: has an empty part between two slashes; rename the object")
        if not any(part.startswith(".") for part in parts):
            yield folder / relative


def open_output(location: str, parent: str | None) -> Path:
    """Return the folder to write what `upload` then copies: the location itself if it is on this machine.

    Else it is in `parent`, by default `LOCAL_OUTPUTS`, and a small object is written and removed: what keeps the store
    from taking the output shows before the work, as a `UserError`.
    """
    if not _is_address(location):
        return Path(location)
    with name_store_in_errors(location):
        target = _open(location)
        probe = target / f"{LAST_FILE}.probe"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except NotImplementedError as error:
            raise UserError(f"{location}: such an address cannot be written to; use s3://, gs:// or abfs://") from error
    return Path(parent or LOCAL_OUTPUTS, own_name(str(target)))


def upload(folder: Path, location: str) -> None:
    """Copy the files of a local folder to their location, and remove them here; nothing if that is where they are.

    A file on an object store appears whole. `LAST_FILE` is removed first and copied last. Nothing keeps two machines
    from writing to one location.
    """
    if not _is_address(location):
        return
    files = sorted(folder.iterdir(), key=lambda file: file.name == LAST_FILE)
    with name_store_in_errors(location, f"; what was to be copied is in {folder}"):
        target = _open(location)
        (target / LAST_FILE).unlink(missing_ok=True)
        with progress(description="copying", total=size_of(files), unit="B", unit_scale=True) as bar:
            for file in files:
                target.fs.put_file(str(file), (target / file.name).path, callback=_Copied(bar))
    shutil.rmtree(folder)


@contextmanager
def name_store_in_errors(location: str, after: str = "") -> Iterator[None]:
    """Turn errors of an object store into a `UserError` that names the location and ends in `after`."""
    try:
        yield
    except Exception as error:
        # Of the operating system's errors, those of a library have a message and no number.
        is_named = isinstance(error, OSError) and error.errno is None and bool(error.args)
        is_of_library = type(error).__module__.partition(".")[0] in _LIBRARIES
        if not _is_address(location) or not (is_named or is_of_library):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{location}: {reason:.300}; correct the address, the credentials or the network{after}"
        ) from error


def _open(location: str) -> UPath:
    kind = location.partition("://")[0]
    try:
        folder = UPath(location)
        _ = folder.fs  # imports the library of the store
    except ImportError as error:
        advice = f"run pip install --editable '.[{EXTRAS[kind]}]'" if kind in EXTRAS else "install it"
        raise UserError(f"{location}: {kind}:// needs a library that is not installed ({error}); {advice}") from error
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{location}: {error}; use one of those of fsspec, such as s3://, gs:// or abfs://") from error
    return folder


def _is_address(location: str) -> bool:
    return _ADDRESS.match(location) is not None
