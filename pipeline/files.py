"""Files and folders that appear whole or not at all; JSON; digests."""

import csv
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"
TEMPORARY_SUFFIX = ".temporary"

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder, which replaces `path` if the block ends without an error.

    A block that raises leaves nothing. What a killed process left under the temporary name is removed by the next one.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _name_full_disk(path):
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


@contextmanager
def temporary_folder(out: Path, parent: str | None) -> Iterator[Path]:
    """Yield an empty folder for files on the way to `out`, removed at the end, and after a kill by the next run.

    It is in `parent` if that is given, under a name that other outputs do not have, else next to `out`.
    """
    if parent is None:
        path = out.with_name(out.name + TEMPORARY_SUFFIX)
    else:
        path = Path(parent, own_name(out.resolve().as_posix()) + TEMPORARY_SUFFIX)
    shutil.rmtree(path, ignore_errors=True)
    with _name_full_disk(path):
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there replaces `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with _name_full_disk(path):
            yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any, to_json: Callable[[Any], Any] | None = None) -> None:
    """Write `value` as indented JSON with a final line end; NaN and infinity are errors.

    `to_json` is called for a value of a type that JSON lacks, when it is its turn to be written.
    """
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False, default=to_json)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    """Write one JSON object per line; NaN and infinity are errors."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file that `write_jsonl` wrote."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def count_lines(path: Path) -> int:
    """Return the number of line ends in a file."""
    count = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
    return count


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV, its header first."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def own_name(location: str) -> str:
    """Return a name for what belongs to a path or address: its last part, and eight digits by all of it."""
    location = location.rstrip("/")
    return f"{location.rpartition('/')[2]}-{hashlib.sha256(location.encode()).hexdigest()[:8]}"


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(paths: Iterable[Path]) -> int:
    """Return the bytes of files and folders."""
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


def digest_of(paths: Iterable[Path]) -> str:
    """Return the hexadecimal SHA-256 of the names and contents of files and folders."""
    files = [
        (file.relative_to(path.parent).as_posix(), sha256_file(file))
        for path in paths
        for file in ([path] if path.is_file() else sorted(path.rglob("*")))
        if file.is_file()
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


@contextmanager
def _name_full_disk(path: Path) -> Iterator[None]:
    """Add the path to the error of a full disk, because the operating system does not name it."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_IS_FULL and error.filename is None:
            error.filename = str(path)
        raise
