"""What made a run: commit, data, base, machine and libraries, as tags."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from pipeline.params.file import read_yaml

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "optimum",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "mlflow",
    "dvc",
)


def lineage() -> dict[str, str]:
    """Tags that lead from a run to what made it: commit, data, base, machine, libraries; absent where unknown."""
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or _git("rev-parse", "HEAD")
    tags = {
        MLFLOW_GIT_COMMIT: commit,
        # Once more under a name that the UI shows.
        "git.commit": commit,
        "git.dirty": _dirty(),
        "dvc.experiment": os.environ.get("DVC_EXP_NAME"),
        "dvc.data_md5": dvc_md5("data"),
        "dvc.base_md5": dvc_md5("out/base"),
        **_machine(),
        **{f"library.{name}": _version(name) for name in LIBRARIES},
    }
    return {name: value for name, value in tags.items() if value}


def dvc_md5(path: str) -> str | None:
    """DVC's hash of a tracked folder or a stage's output, from `PATH.dvc` or `dvc.lock`."""
    pointer = Path(f"{path}.dvc")
    if pointer.exists():
        return read_yaml(pointer)["outs"][0].get("md5")
    lock = Path("dvc.lock")
    if not lock.exists():
        return None
    stages = read_yaml(lock).get("stages", {}).values()
    return next((out.get("md5") for stage in stages for out in stage.get("outs", []) if out["path"] == path), None)


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _dirty() -> str | None:
    # dvc.lock changes with every stage that runs: it says nothing about the code.
    changes = _git("status", "--porcelain", "--", ".", ":!dvc.lock")
    return None if changes is None else str(bool(changes)).lower()


def _machine() -> dict[str, str | None]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    gpus = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = ", ".join(subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines())
    return {
        "machine.platform": platform.platform(),
        "machine.python": platform.python_version(),
        "machine.cpu": f"{model}, {os.cpu_count()} cores",
        "machine.gpu": gpus,
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
