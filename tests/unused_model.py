"""A model for the registry whose code must never run: what a test reads of it is its files."""

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
    """Log it under the run with these artifacts; its code is written to `folder`. Gives its URI."""
    code = folder / "unused.py"
    code.write_text(SOURCE)
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(name="model", python_model=str(code), artifacts=artifacts, pip_requirements=[])
    return str(logged.model_uri)
