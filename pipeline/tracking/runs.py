"""Runs in MLflow: open one, write to it, find it again."""

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import (
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
)

from pipeline.files import digest_of
from pipeline.tracking import lineage
from pipeline.tracking.notes import set_section
from pipeline.tracking.store import answering_soon, connect, experiment_id
from pipeline.tracking.tags import FINGERPRINT_TAG, RESTORED_TAG, STAGE_TAG

OUTPUTS_TAG = "pipeline.outputs_sha256"
"""The digest of what a stage wrote, by which later stages and `restore` find its run: ids are random, files are not."""
SECTIONS = ("prepare", "base", "finetune", "export", "samples", "tune", "evaluate", "register")
"""The sections of `params.yaml`, each before those of later stages; `samples` is read by `tune` and `evaluate`."""
TRIAL = "trial"
TRIAL_TAG = "pipeline.trial"
MONITORED = ("finetune", "tune")
"""The stages that take long: their runs show what the machine does."""
DIGEST_CHARACTERS = 36
"""The most characters of a data set's digest that MLflow takes."""
BEST_TAG = "pipeline.best"
"""The tag of the checkpoint whose weights the fine-tuning keeps."""
VALIDATION = "validation"
"""The name of the validation split as a data set of runs."""
LONGEST_NAME = 250
"""The longest name of a run that databases take, in characters."""


@dataclass(frozen=True)
class RunLog:
    """A run that is being written to."""

    client: MlflowClient
    run_id: str
    last_steps: Mapping[str, int] = field(default_factory=dict)
    """The last step of each metric, if the run is resumed: up to that step nothing is logged again."""
    datasets: dict[str, str] = field(default_factory=dict)
    """The digests of the data sets that the run has read, by their names."""

    def log_metrics(
        self, values: Mapping[str, float], step: int = 0, *, model_id: str | None = None, dataset: str | None = None
    ) -> None:
        """Log metrics of the run; with `model_id`, also of that model.

        They are noted as taken on the data set of this name if `log_dataset` has logged it in this process.
        """
        now_ms = int(time.time() * 1000)
        new = {name: value for name, value in values.items() if step > self.last_steps.get(name, -1)}
        digest = self.datasets.get(dataset or "")
        source = (model_id, dataset if digest else None, digest)
        if new:
            metrics = [Metric(name, float(value), now_ms, step, *source) for name, value in new.items()]
            self.client.log_batch(self.run_id, metrics=metrics)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, nested ones by names with dots."""
        flat = lineage.flatten(values)
        # MLflow refuses other characters, such as those of the patterns in prepare.encoding.
        params = [Param(re.sub(r"[^/\w.\- :]", "_", name), str(value)) for name, value in flat.items()]
        self.client.log_batch(self.run_id, params=params)

    def log_checkpoint(self, step: int, scores: Mapping[str, float]) -> None:
        """Log the scores of the weights after a step, as those of a model of their own; its weights are not stored."""
        if step <= max((self.last_steps.get(score, -1) for score in scores), default=-1):
            return
        # A process that was killed may have left it.
        found = self._checkpoint(step)
        if found is None:
            name, params = f"checkpoint-{step}", {"step": str(step)}
            found = self.client.create_logged_model(self.experiment_id, name, self.run_id, params=params)
            self.client.log_outputs(self.run_id, [LoggedModelOutput(found.model_id, step)])
        self.log_metrics(scores, step, model_id=found.model_id, dataset=VALIDATION)
        self.client.finalize_logged_model(found.model_id, LoggedModelStatus.READY)

    def tag_best(self, step: int) -> None:
        """Tag the checkpoint with the lowest validation loss, whose weights the fine-tuning keeps."""
        if (found := self._checkpoint(step)) is not None:
            self.client.set_logged_model_tags(found.model_id, {BEST_TAG: "true"})

    def _checkpoint(self, step: int) -> LoggedModel | None:
        query = f"source_run_id = '{self.run_id}' AND name = 'checkpoint-{step}'"
        return next(iter(self.client.search_logged_models([self.experiment_id], query)), None)

    @property
    def experiment_id(self) -> str:
        return str(self.client.get_run(self.run_id).info.experiment_id)

    @property
    def name(self) -> str:
        return str(self.client.get_run(self.run_id).info.run_name)

    def tags(self) -> dict[str, str]:
        return dict(self.client.get_run(self.run_id).data.tags)

    def parent(self) -> "RunLog":
        """Return the run of the fine-tuning under which this run is."""
        return RunLog(self.client, self.tags()[MLFLOW_PARENT_RUN_ID])

    def describe(self, heading: str, text: str) -> None:
        """Set a section of the run's description, in Markdown."""
        self.set_tags({MLFLOW_RUN_NOTE: set_section(self.tags().get(MLFLOW_RUN_NOTE, ""), heading, text)})

    def holds_row(self, table: str, column: str, value: Any) -> bool:
        """Return whether a table of the run has a row with this value."""
        if not any(file.path == table for file in self.client.list_artifacts(self.run_id)):
            return False
        rows = self.client.load_table(self.experiment_id, table, run_ids=[self.run_id])
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
            self.experiment_id,
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
            [self.experiment_id],
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

    def log_dataset(self, name: str, sha256: str, source: Mapping[str, str]) -> None:
        """Record the data that the run read, by the beginning of its digest."""
        digest = self.datasets[name] = sha256[:DIGEST_CHARACTERS]
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
    restored: Path | None = None,
) -> Iterator[RunLog]:
    """Open a run with its parameters and lineage; it ends as finished, or as failed if the block raises.

    `parameters` is the parsed `params.yaml`; the run gets the sections of its stage and of those before it, which made
    it. `run_id` names an interrupted run of the store, which is resumed and keeps its parameters: MLflow changes none.
    `fingerprint` names all that the outputs depend on, for `fingerprint_of`. `restored` is the folder from
    which a run that the store lost is recorded again.
    """
    client = connect()
    tags = {**stage_tags(stage), **lineage.lineage()}
    if fingerprint is not None:
        tags[FINGERPRINT_TAG] = fingerprint
    if restored is not None:
        print(f"the tracking store does not hold the run that wrote {restored}; recording it again", file=sys.stderr)
        tags[RESTORED_TAG] = "true"
    if parent_run_id is not None:
        tags[MLFLOW_PARENT_RUN_ID] = parent_run_id
    if run_id is None:
        name = run_name(parameters) if parent_run_id is None else f"{stage} {RunLog(client, parent_run_id).name}"
        if name:
            tags[MLFLOW_RUN_NAME] = name[:LONGEST_NAME]
        log = RunLog(client, client.create_run(experiment_id(client), tags=tags).info.run_id)
    else:
        client.update_run(run_id, status="RUNNING")
        # Those of the system have a point per ten seconds, and are continued by themselves.
        known = [name for name in client.get_run(run_id).data.metrics if not name.startswith("system/")]
        log = RunLog(
            client,
            run_id,
            {name: max(point.step for point in client.get_metric_history(run_id, name)) for name in known},
        )
        log.set_tags(tags)
    later = SECTIONS[SECTIONS.index(stage) + 1 :]
    own = {section: values for section, values in parameters.items() if section not in later}
    try:
        if run_id is None:
            log.log_params(own)
        is_monitored = stage in MONITORED and not restored
        with _system_metrics(log.run_id, is_resumed=run_id is not None) if is_monitored else nullcontext():
            yield log
    except BaseException:
        with answering_soon():
            client.set_terminated(log.run_id, "FAILED")
        raise
    client.set_terminated(log.run_id)


def stage_tags(stage: str) -> dict[str, str]:
    """Return the tags that name the stage, for this package and for MLflow's pages."""
    return {STAGE_TAG: stage, MLFLOW_SOURCE_NAME: f"pipeline.stages.{stage}", MLFLOW_SOURCE_TYPE: "LOCAL"}


def run_name(parameters: Mapping[str, Any]) -> str:
    """Return a name that says which model it is, or which DVC experiment, and what was changed for it."""
    model = parameters.get("register", {}).get("name", "")
    name = os.environ.get("DVC_EXP_NAME") or model
    changed = lineage.describe(lineage.changes(parameters))
    return f"{name}: {changed}" if changed else name


@contextmanager
def _system_metrics(run_id: str, *, is_resumed: bool) -> Iterator[None]:
    """Log to the run what processor, memory, disk, network and GPUs do meanwhile.

    Where MLflow cannot read that, such as without a network interface, a line says so.
    """
    try:
        monitor: Any = SystemMetricsMonitor(run_id, resume_logging=is_resumed)  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001
        print(f"system metrics are not recorded ({type(error).__name__}: {error})", file=sys.stderr)
        yield
        return
    monitor.start()
    try:
        yield
    finally:
        with answering_soon():
            monitor.finish()


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
