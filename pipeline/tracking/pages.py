"""The addresses of MLflow's pages, after the address of the server: texts in the store link to each other by them."""

import re
from urllib.parse import quote

UI_PORT = 5000
"""The port of `python -m pipeline ui`, unless another is given."""
RUNS_VIEW = "fine-tunings"
"""The name in addresses of the saved view of the runs: see `pipeline.tracking.views`."""


def is_server(store_uri: str) -> bool:
    """Return whether the store is an MLflow server, which shows its pages itself."""
    return re.match("https?://", store_uri) is not None


def ui_url(store_uri: str) -> str:
    """Return the address of the server whose pages show the store: its own, or that of `python -m pipeline ui`."""
    return store_uri.rstrip("/") if is_server(store_uri) else f"http://127.0.0.1:{UI_PORT}"


def where_to_look(store_uri: str, experiment_id: str, name: str, version: int | str) -> str:
    """Return lines that say where a version and the runs are shown."""
    url = ui_url(store_uri)
    begin = "" if is_server(store_uri) else "make ui shows these pages:\n"
    return f"{begin}  {url}/{version_page(name, version)}  the model card\n  {url}/{runs_page(experiment_id)}  the runs"


def runs_page(experiment_id: str) -> str:
    """Return the address of the table of all runs, with the columns that compare them."""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={RUNS_VIEW}"


def run_page(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}"


def file_page(experiment_id: str, run_id: str, file: str) -> str:
    """Return the address of a file of a run."""
    return f"{run_page(experiment_id, run_id)}/artifacts/{quote(file)}"


def samples_page(experiment_id: str, run_id: str) -> str:
    """Return the address of an evaluation's samples, prompt by prompt, where they can be compared with another's."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/traces?workflowType=genai"


def version_page(name: str, version: int | str) -> str:
    return f"#/models/{quote(name)}/versions/{version}"
