"""An MLflow store of a test's own: its folder is the project, and nothing of it outlives the test."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")


@contextmanager
def isolated_store(folder: Path) -> Iterator[None]:
    """Make `folder` the current one and DVC's root, with the embedded store that is there, or else an empty one."""
    if not (folder / "mlflow.db").exists():
        (folder / "mlflow.db").write_bytes(_empty_database())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DVC_ROOT", str(folder))
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)


@cache
def _empty_database() -> bytes:
    """Migrating takes seconds, so it is done once a session."""
    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return (Path(folder) / "mlflow.db").read_bytes()
