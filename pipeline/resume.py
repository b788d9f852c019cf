"""What an interrupted stage resumes from: a folder under `.resume/`, named by a fingerprint of all that it depends on.

DVC removes a stage's outputs before the stage runs and would hash whatever is in them, so the state of unfinished work
is kept in a folder of its own that git ignores. Work with another fingerprint is of no use, and is removed.
"""

import ast
import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.files import digest_of, read_json, sha256_file, write_json
from pipeline.imports import PACKAGE, needed_files
from pipeline.stage_process import only_writer
from pipeline.tracking.runs import end_killed_run, find_run, fingerprint_of, holds_run
from pipeline.tracking.store import connect, store_uri, without_password

RESUME_FOLDER = Path(".resume")
RUN_FILE = "run.json"
LOCK_WAIT_S = 60
"""The wait for a process that was asked to stop and is saving its work."""


def fingerprint(stage: str, read: Iterable[Path], *facts: str) -> str:
    """Return 16 hexadecimal digits for all that a stage's result depends on: what it reads, its code, and `facts`."""
    root = Path(__file__).parents[1]
    code = [code_digest(file) for file in sorted(needed_files(f"{PACKAGE}.stages.{stage}", root))]
    return hashlib.sha256("\n".join([digest_of(read), *code, *facts]).encode()).hexdigest()[:16]


def code_digest(file: Path) -> str:
    """Return a digest of what a file does: of a module without its comments and docstrings, of others whole."""
    if file.suffix != ".py":
        return sha256_file(file)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A string that stands alone is a docstring, of a module, class, function or field.
            node.body = [part for part in body if not _is_string(part)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@contextmanager
def only_resumer(stage: str) -> Iterator[None]:
    """Keep a second process of this stage out of the project's state. Raises `UserError` if one is running."""
    with only_writer(RESUME_FOLDER / stage, LOCK_WAIT_S):
        yield


def open_folder(stage: str, name: str) -> Path:
    """Return the folder of the work with this fingerprint; remove other work, end its run, and say so."""
    folder = RESUME_FOLDER / stage / name
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other != folder:
            print(f"{stage}: data, models, parameters or code have changed since it was interrupted: it starts again",
                  file=sys.stderr)  # fmt: skip
            if (file := other / RUN_FILE).is_file():
                end_killed_run(read_json(file)["run_id"])
            shutil.rmtree(other)
    return folder


def note_run(folder: Path, run_id: str) -> None:
    """Note the run that records the work in `folder` from now on."""
    write_json(folder / RUN_FILE, {"run_id": run_id})


def interrupted_run(stage: str, folder: Path) -> str | None:
    """Return the id of the run that records the work in `folder`; None if there is none yet.

    Returns None, with a line that says so, if the tracking store does not hold that run: it may be another store.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        return None
    run_id = str(read_json(file)["run_id"])
    if holds_run(run_id):
        return run_id
    print(f"{stage}: the tracking store {without_password(store_uri())} does not hold the interrupted run: the work "
          "continues in a new run; if that is the wrong store, set MLFLOW_TRACKING_URI", file=sys.stderr)  # fmt: skip
    return None


def remove(folder: Path) -> None:
    """Remove the folder: the work is finished, and its outputs are in their place."""
    shutil.rmtree(folder)


def holds_outputs(stage: str, name: str, out: Path) -> bool:
    """Return whether `out` already is what this stage would write: its run has this fingerprint and wrote these files.

    DVC runs a stage when any byte of its code changes. A comment or a docstring should not cost hours of training.
    """
    if not out.is_dir():
        return False
    client = connect()
    run_id = find_run(client, stage, out)
    if run_id is None or fingerprint_of(client, run_id) != name:
        return False
    print(f"{stage}: nothing but comments and docstrings has changed since run {run_id} wrote {out}: it is kept; "
          f"remove {out} to make it again", file=sys.stderr)  # fmt: skip
    return True
