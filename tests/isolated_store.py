"""An MLflow store for one test: the test's folder is the project, and its settings end with the test."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from shared_folder import shared_folder

STORE = "mlflow.db"
VARIABLES = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_EXPERIMENT_NAME"),
    *("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"),
)


@contextmanager
def isolated_store(folder: Path) -> Iterator[None]:
    """Make `folder` the current one and DVC's root, with the embedded store that is there, or else an empty one."""
    add_empty_store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DVC_ROOT", str(folder))
        for name in VARIABLES:
            # Set first, so that what the test's code sets is removed at the end.
            patch.setenv(name, "")
            patch.delenv(name)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)


def add_empty_store(folder: Path) -> None:
    """Write an empty embedded store to `folder` unless there is one. Migrating one takes seconds, so it is a copy."""
    if not (folder / STORE).exists():
        shutil.copy(shared_folder("empty-store", _make_empty_store) / STORE, folder)


def _make_empty_store(folder: Path) -> None:
    MlflowClient(f"sqlite:///{folder / STORE}").search_experiments()


def copy_store(source: Path, target: Path) -> None:
    """Copy the embedded store of the project `source`; the copy's runs name the files of `target`."""
    with closing(sqlite3.connect(f"file:{source / STORE}?mode=ro", uri=True)) as store:
        statements = "\n".join(store.iterdump())
    with closing(sqlite3.connect(target / STORE)) as store:
        store.executescript(statements.replace(str(source), str(target)))
