"""Runs and their lineage: the only module that imports mlflow's tracking API.

The store is `sqlite:///<root>/mlflow.db` unless `MLFLOW_TRACKING_URI` names another; `<root>` is `DVC_ROOT` where DVC
sets it, so that queued and temporary experiments write to the same store as the working tree.
"""

import json
import logging
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

# Read by mlflow when it is imported: no bars for files of a few kB.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
)

from pipeline.errors import UserError
from pipeline.params import read_yaml

EXPERIMENT = "gpt2-pipeline"
STAGE_TAG = "pipeline.stage"
RESTORES_TAG = "pipeline.restores"
TRIAL = "trial"
TRIAL_TAG = "pipeline.trial"
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


def root() -> Path:
    """The folder of the project: DVC's root, or the current folder outside of DVC."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def embedded_uri() -> str:
    """Where runs are stored unless `MLFLOW_TRACKING_URI` says otherwise."""
    return f"sqlite:///{root() / 'mlflow.db'}"


def store_lock() -> FileLock:
    """Held while the store is created and while aliases move: two processes migrating a fresh sqlite crash."""
    return FileLock(root() / "mlflow.db.lock")


def store_uri() -> str:
    """The tracking store in use."""
    return os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri()


def connect(*, create: bool = True) -> MlflowClient:
    """A client of the tracking store; the embedded one is made where it is not there yet, unless `create` is false.

    Raises `UserError` where the store cannot be reached, or is not there.
    """
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    uri = store_uri()
    if not create and uri == embedded_uri() and not (root() / "mlflow.db").exists():
        raise UserError(
            f"{root() / 'mlflow.db'}: there is no tracking store here; go to the folder of the project, "
            "or set MLFLOW_TRACKING_URI to its store"
        )
    try:
        with store_lock(), _answering_soon():
            mlflow.set_tracking_uri(uri)
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
    # ImportError: the driver of the database that the URI names is not installed.
    except (MlflowException, ImportError) as error:
        raise UserError(
            f"tracking store {without_password(uri)} does not answer; set MLFLOW_TRACKING_URI to one that does, "
            f"or unset it for the embedded store ({_reason(error)})"
        ) from error
    return client


@contextmanager
def store_errors() -> Iterator[None]:
    """Tell in one line what MLflow, a full disk or a server that went away kept from being recorded or read."""
    try:
        yield
    except MlflowException as error:
        raise UserError(
            f"MLflow, tracking store {without_password(store_uri())}: {_reason(error)}; "
            "run the command again when that is mended"
        ) from error


def without_password(text: str) -> str:
    """The text without the user and password that URIs in it may hold."""
    return re.sub(r"//[^/\s]*@", "//", text)


def _reason(error: BaseException) -> str:
    """One line that says what went wrong: the database's own word where there is one, else the first line."""
    inner: BaseException | None = error
    while inner is not None:
        # SQLAlchemy wraps it in lines of SQL and advice.
        if (original := getattr(inner, "orig", None)) is not None:
            return without_password(str(original))
        inner = inner.__cause__ or inner.__context__
    return without_password((str(error).splitlines() or [type(error).__name__])[0])


@contextmanager
def _answering_soon() -> Iterator[None]:
    """A server that is not there is reported within seconds; what the user has set stands, as do later uploads."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
    own = {name: value for name, value in limits.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


def experiment_id(client: MlflowClient) -> str:
    """The id of the experiment that holds every run (`MLFLOW_EXPERIMENT_NAME`, or `EXPERIMENT`), created if need be."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    with store_lock():
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            embedded = mlflow.get_tracking_uri() == embedded_uri()
            location = (root() / "mlartifacts").as_uri() if embedded else None
            return str(client.create_experiment(name, artifact_location=location))
    if experiment.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment {name!r} is deleted; restore it, or set MLFLOW_EXPERIMENT_NAME to another")
    return str(experiment.experiment_id)


@dataclass(frozen=True)
class RunLog:
    """A run that is being written to."""

    client: MlflowClient
    run_id: str
    last_steps: Mapping[str, int] = field(default_factory=dict)
    """Of a run that goes on: the last step of each metric that it holds. Up to there nothing is logged again."""

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        now_ms = int(time.time() * 1000)
        new = {name: value for name, value in values.items() if step > self.last_steps.get(name, -1)}
        metrics = [Metric(name, float(value), now_ms, step) for name, value in new.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def holds_row(self, table: str, column: str, value: Any) -> bool:
        """Whether a table of the run holds a row with this value."""
        if not any(file.path == table for file in self.client.list_artifacts(self.run_id)):
            return False
        rows = self.client.load_table(experiment_id(self.client), table, run_ids=[self.run_id])
        return bool((rows[column] == value).any())

    def log_scores(self, group: str, values: Mapping[str, Any]) -> None:
        """Log the numbers of `values` as `group/name`; the UI shows a group in a section of its own."""
        self.log_metrics({f"{group}/{name}": value for name, value in values.items() if isinstance(value, int | float)})

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows of the same keys to the table `name`, which the UI shows under Artifacts."""
        if not rows:
            return
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        self.client.log_table(self.run_id, columns, name)

    def log_trial(
        self,
        number: int,
        parameters: Mapping[str, Any],
        scores: Mapping[str, float],
        tags: Mapping[str, str],
        start_s: float,
    ) -> None:
        """Record a trial of a search, begun at `start_s` and ended now, as a child run with its number."""
        run = self.client.create_run(
            experiment_id(self.client),
            start_time=int(start_s * 1000),
            run_name=f"trial {number}",
            tags={MLFLOW_PARENT_RUN_ID: self.run_id, STAGE_TAG: TRIAL, TRIAL_TAG: str(number), **tags},
        )
        now_ms = int(time.time() * 1000)
        self.client.log_batch(
            run.info.run_id,
            metrics=[Metric(name, float(value), now_ms, 0) for name, value in scores.items()],
            params=[Param(name, str(value)) for name, value in parameters.items()],
        )
        self.client.set_terminated(run.info.run_id)

    def forget_trials(self, first: int) -> None:
        """Remove the child runs of the trials from this number on, which are to be taken anew."""
        children = self.client.search_runs(
            [experiment_id(self.client)],
            filter_string=f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}' and tags.`{STAGE_TAG}` = '{TRIAL}'",
        )
        for child in children:
            if int(child.data.tags[TRIAL_TAG]) >= first:
                self.client.delete_run(child.info.run_id)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(path), folder)

    def log_dataset(self, name: str, digest: str, source: Mapping[str, str]) -> None:
        """Record what data the run read, by its digest (at most 36 characters)."""
        dataset = MetaDataset(  # type: ignore[abstract]  # mlflow itself makes them; its annotation is off
            CodeDatasetSource(tags=dict(source)), name=name, digest=digest
        )
        context = InputTag(MLFLOW_DATASET_CONTEXT, name)
        self.client.log_inputs(self.run_id, [DatasetInput(dataset._to_mlflow_entity(), tags=[context])])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


@contextmanager
def start_run(
    stage: str,
    parameters: Mapping[str, Any],
    *,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    run_id: str | None = None,
) -> Iterator[RunLog]:
    """Open a run with all parameters and its lineage; it ends as finished, or as failed where the block raises.

    `parameters` is the parsed `params.yaml`; `run_id` is a run of the store that was interrupted, and goes on.
    """
    client = connect()
    all_tags = {STAGE_TAG: stage, **lineage(), **(tags or {})}
    name = os.environ.get("DVC_EXP_NAME")
    if parent_run_id is not None:
        all_tags[MLFLOW_PARENT_RUN_ID] = parent_run_id
        name = stage
    if name:
        all_tags[MLFLOW_RUN_NAME] = name
    if run_id is None:
        log = RunLog(client, client.create_run(experiment_id(client), tags=all_tags).info.run_id)
    else:
        client.update_run(run_id, status="RUNNING")
        known = client.get_run(run_id).data.metrics
        log = RunLog(
            client,
            run_id,
            {name: max(point.step for point in client.get_metric_history(run_id, name)) for name in known},
        )
        log.set_tags(all_tags)
    try:
        client.log_batch(log.run_id, params=[Param(key, str(value)) for key, value in flatten(parameters).items()])
        yield log
    except BaseException:
        client.set_terminated(log.run_id, "FAILED")
        raise
    client.set_terminated(log.run_id)


def holds_run(run_id: str) -> bool:
    """Whether the store holds this very run."""
    client = connect()
    return find_run(client, run_id) == run_id


def give_up_run(run_id: str) -> None:
    """End a run that was interrupted and will not go on."""
    connect().set_terminated(run_id, "KILLED")


def find_run(client: MlflowClient, run_id: str) -> str | None:
    """`run_id`, or the run that restores it, where the store holds either."""
    try:
        if client.get_run(run_id).info.lifecycle_stage == "active":
            return run_id
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
    restored = client.search_runs(
        [experiment_id(client)],
        filter_string=f"tags.`{RESTORES_TAG}` = '{run_id}' and attributes.status = 'FINISHED'",
        max_results=1,
    )
    return str(restored[0].info.run_id) if restored else None


def find_child(client: MlflowClient, parent_run_id: str, stage: str) -> str | None:
    """The newest finished child run of a stage."""
    children = client.search_runs(
        [experiment_id(client)],
        filter_string=(
            f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent_run_id}' and tags.`{STAGE_TAG}` = '{stage}' "
            "and attributes.status = 'FINISHED'"
        ),
        max_results=1,
    )
    return str(children[0].info.run_id) if children else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return flat


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
