"""What made a run: commit, data, base, machine and libraries, as tags."""

import os
import platform
from pathlib import Path

from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from pipeline import machine
from pipeline.params.section import read_yaml


def lineage() -> dict[str, str]:
    """Return tags that lead from a run to what made it. Tags whose value is unknown are left out."""
    checkout = machine.read_checkout(Path.cwd())
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or (checkout and checkout.commit)
    tags = {
        MLFLOW_GIT_COMMIT: commit,
        # The same again under a name that the UI shows.
        "git.commit": commit,
        "git.dirty": checkout and str(checkout.is_changed).lower(),
        "dvc.experiment": os.environ.get("DVC_EXP_NAME"),
        "dvc.data_md5": dvc_md5("data"),
        "dvc.base_md5": dvc_md5("out/base"),
        "machine.platform": platform.platform(),
        "machine.python": platform.python_version(),
        "machine.cpu": f"{machine.processor_name()}, {os.cpu_count()} cores",
        "machine.gpu": machine.gpu_names(),
        **{f"library.{name}": version for name, version in machine.versions().items()},
    }
    return {name: value for name, value in tags.items() if value}


def dvc_md5(path: str) -> str | None:
    """Return DVC's hash of a tracked folder or a stage's output, from `PATH.dvc` or `dvc.lock`; None if unknown."""
    pointer = Path(f"{path}.dvc")
    if pointer.exists():
        return read_yaml(pointer)["outs"][0].get("md5")
    lock = Path("dvc.lock")
    if not lock.exists():
        return None
    stages = read_yaml(lock).get("stages", {}).values()
    return next((out.get("md5") for stage in stages for out in stage.get("outs", []) if out["path"] == path), None)
