"""`python -m pipeline restore`: record again what the tracking store lacks of the outputs under `out/`."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.tracking.records import parent_run, record_evaluation, record_search
from pipeline.tracking.registry import find_version
from pipeline.tracking.runs import find_run, start_run
from pipeline.tracking.store import connect


def restore(out: Path, parameters: Mapping[str, Any]) -> None:
    """Record the runs and the version that the store lacks; do nothing if it has all of them.

    Only `register` runs again, as it is what records a version. `parameters` is the parsed `params.yaml`. Raises
    `UserError` if `register` fails.
    """
    client = connect()
    parent = parent_run(client, out / "finetune", parameters)
    if find_run(client, "tune", out / "tune") is None:
        with start_run("tune", parameters, parent_run_id=parent, restored=out / "tune") as run:
            record_search(run, out / "tune")
    if find_run(client, "evaluate", out / "evaluate") is None:
        with start_run("evaluate", parameters, parent_run_id=parent, restored=out / "evaluate") as run:
            parity, test = out / "export" / "parity.json", out / "prepare" / "test.jsonl"
            record_evaluation(run, out / "evaluate", parity, test, parameters)
    if not holds_version(client, out / "register" / "version.json"):
        print("the registry does not hold the version that register wrote; registering it again", file=sys.stderr)
        if subprocess.run(["dvc", "repro", "--force", "--single-item", "register"], check=False).returncode:
            raise UserError("register failed; see above, and call restore again")


def holds_version(client: MlflowClient, file: Path) -> bool:
    """Return whether the registry holds the version that `register` noted in `file`."""
    noted = read_json(file)
    return find_version(client, noted["name"], noted["fingerprint"]) is not None
