"""A model for the registry that is never run: tests read its files only."""

from pathlib import Path

import mlflow

SOURCE = """
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class Unused(PythonModel):
    def predict(self, model_input: list[str]) -> list[str]:
        raise NotImplementedError


set_model(Unused())
"""


def log_unused_model(run_id: str, folder: Path, artifacts: dict[str, str]) -> str:
    """Log the model with these artifacts under a run, and return its URI. Its code is written to `folder`."""
    code = folder / "unused.py"
    code.write_text(SOURCE)
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(name="model", python_model=str(code), artifacts=artifacts, pip_requirements=[])
    return str(logged.model_uri)
