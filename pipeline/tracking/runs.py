"""Runs in MLflow: open one, write to it, find it again."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from pipeline.files import digest_of
from pipeline.tracking.lineage import lineage
from pipeline.tracking.store import answering_soon, connect, experiment_id

STAGE_TAG = "pipeline.stage"
OUTPUTS_TAG = "pipeline.outputs_sha256"
"""The digest of what a stage wrote, by which later stages and `restore` find its run: ids are random, files are not."""
FINGERPRINT_TAG = "pipeline.fingerprint"
"""The name of all that a stage's outputs depend on: data, parameters, code, libraries."""
SECTIONS = ("prepare", "base", "finetune", "export", "samples", "tune", "evaluate", "register")
"""The sections of `params.yaml`, each before those of later stages; `samples` is read by `tune` and `evaluate`."""
TRIAL = "trial"
TRIAL_TAG = "pipeline.trial"


@dataclass(frozen=True)
class RunLog:
    """A run that is being written to."""

    client: MlflowClient
    run_id: str
    last_steps: Mapping[str, int] = field(default_factory=dict)
    """The last step of each metric, if the run is resumed: up to that step nothing is logged again."""

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        now_ms = int(time.time() * 1000)
        new = {name: value for name, value in values.items() if step > self.last_steps.get(name, -1)}
        if new:
            metrics = [Metric(name, float(value), now_ms, step) for name, value in new.items()]
            self.client.log_batch(self.run_id, metrics=metrics)

    def holds_row(self, table: str, column: str, value: Any) -> bool:
        """Return whether a table of the run has a row with this value."""
        if not any(file.path == table for file in self.client.list_artifacts(self.run_id)):
            return False
        rows = self.client.load_table(experiment_id(self.client), table, run_ids=[self.run_id])
        return bool((rows[column] == value).any())

    def log_scores(self, group: str, values: Mapping[str, Any]) -> None:
        """Log the numbers of `values` as `group/name`; the UI shows each group in its own section."""
        self.log_metrics({f"{group}/{name}": value for name, value in values.items() if isinstance(value, int | float)})

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows with equal keys to the table `name`, which the UI shows under Artifacts."""
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
        start_s: float | None = None,
    ) -> None:
        """Record trial `number` of a search as a child run that started at `start_s` (now if None) and ends now."""
        now_ms = int(time.time() * 1000)
        run = self.client.create_run(
            experiment_id(self.client),
            start_time=now_ms if start_s is None else int(start_s * 1000),
            run_name=f"trial {number}",
            tags={MLFLOW_PARENT_RUN_ID: self.run_id, STAGE_TAG: TRIAL, TRIAL_TAG: str(number), **tags},
        )
        self.client.log_batch(
            run.info.run_id,
            metrics=[Metric(name, float(value), now_ms, 0) for name, value in scores.items()],
            params=[Param(name, str(value)) for name, value in parameters.items()],
        )
        self.client.set_terminated(run.info.run_id)

    def trials(self) -> dict[int, str]:
        """Return the ids of the runs of this search's trials, by the trial's number."""
        children = self.client.search_runs(
            [experiment_id(self.client)],
            filter_string=f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}' and tags.`{STAGE_TAG}` = '{TRIAL}'",
        )
        return {int(child.data.tags[TRIAL_TAG]): str(child.info.run_id) for child in children}

    def forget_trials(self, first: int) -> None:
        """Delete the runs of the trials from number `first` on, which will be run again."""
        for number, run_id in self.trials().items():
            if number >= first:
                self.client.delete_run(run_id)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(path), folder)

    def log_dataset(self, name: str, digest: str, source: Mapping[str, str]) -> None:
        """Record the data that the run read, by its digest (at most 36 characters)."""
        dataset = MetaDataset(  # type: ignore[abstract]  # mlflow itself makes them; its annotation is off
            CodeDatasetSource(tags=dict(source)), name=name, digest=digest
        )
        context = InputTag(MLFLOW_DATASET_CONTEXT, name)
        self.client.log_inputs(self.run_id, [DatasetInput(dataset._to_mlflow_entity(), tags=[context])])

    def tag_outputs(self, outputs: Path) -> None:
        """Tag the run with the digest of the folder that its stage wrote, so that `find_run` finds it."""
        self.set_tags({OUTPUTS_TAG: digest_of([outputs])})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


@contextmanager
def start_run(
    stage: str,
    parameters: Mapping[str, Any],
    *,
    parent_run_id: str | None = None,
    run_id: str | None = None,
    fingerprint: str | None = None,
) -> Iterator[RunLog]:
    """Open a run with its parameters and lineage; it ends as finished, or as failed if the block raises.

    `parameters` is the parsed `params.yaml`; the run gets the sections of its stage and of those before it, which made
    it. `run_id` names an interrupted run of the store, which is resumed and keeps its parameters: MLflow changes none.
    `fingerprint` names all that the outputs depend on, for `fingerprint_of`.
    """
    client = connect()
    all_tags = {STAGE_TAG: stage, **lineage()}
    if fingerprint is not None:
        all_tags[FINGERPRINT_TAG] = fingerprint
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
    later = SECTIONS[SECTIONS.index(stage) + 1 :]
    own = {section: values for section, values in parameters.items() if section not in later}
    try:
        if run_id is None:
            client.log_batch(log.run_id, params=[Param(key, str(value)) for key, value in flatten(own).items()])
        yield log
    except BaseException:
        with answering_soon():
            client.set_terminated(log.run_id, "FAILED")
        raise
    client.set_terminated(log.run_id)


def holds_run(run_id: str) -> bool:
    """Return whether the store holds this run, and nobody has deleted it."""
    try:
        return bool(connect().get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return False


def end_killed_run(run_id: str) -> None:
    """Mark a run as killed if the store says that it is running."""
    client = connect()
    if holds_run(run_id) and client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, "KILLED")


def find_run(client: MlflowClient, stage: str, outputs: Path) -> str | None:
    """Return the id of the newest finished run of `stage` that wrote exactly these files, or None."""
    found = client.search_runs(
        [experiment_id(client)],
        filter_string=(
            f"tags.`{OUTPUTS_TAG}` = '{digest_of([outputs])}' and tags.`{STAGE_TAG}` = '{stage}' "
            "and attributes.status = 'FINISHED'"
        ),
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return str(found[0].info.run_id) if found else None


def fingerprint_of(client: MlflowClient, run_id: str) -> str | None:
    """Return the fingerprint that a run was started with; None if it had none."""
    tag = client.get_run(run_id).data.tags.get(FINGERPRINT_TAG)
    return None if tag is None else str(tag)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with keys joined by dots and lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return flat
