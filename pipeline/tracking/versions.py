"""Recording a registered model: its scores, its links with the runs that made it, and what its pages say."""

from pathlib import Path

from mlflow.entities import LoggedModelInput, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion

from pipeline.engine.manifest import measure_megabytes
from pipeline.files import read_json
from pipeline.tracking import notes, pages
from pipeline.tracking.records import TEST, links_of_evaluation
from pipeline.tracking.runs import RunLog, find_run, holds_run


def record_model(run: RunLog, model_id: str, evaluate: Path, export: Path, test_split_sha256: str) -> None:
    """Record the scores of a logged model with it, and link it with the runs that trained and evaluated it."""
    run.log_dataset(TEST, test_split_sha256, {"split": TEST})
    run.log_metrics(read_json(evaluate / "metrics.json"), model_id=model_id, dataset=TEST)
    for precision, found in read_json(export / "parity.json").items():
        if "left_out" in found:
            continue
        own = {name: found[name] for name in ("kl_divergence", "next_token_agreement")}
        own["megabytes"] = measure_megabytes(export / "engine", precision)
        run.log_metrics({f"{precision}/{name}": value for name, value in own.items()}, model_id=model_id)
    run.client.log_outputs(run.parent().run_id, [LoggedModelOutput(model_id, 0)])
    evaluation = find_run(run.client, "evaluate", evaluate)
    if evaluation is not None:
        run.client.log_inputs(evaluation, models=[LoggedModelInput(model_id)])


def links_of_version(run: RunLog, evaluate: Path) -> dict[str, str]:
    """Return the pages of the fine-tuning and the evaluation of a version, by their titles; `run` registered it.

    Without those of runs that the store does not hold any more.
    """
    parent, evaluation = run.parent(), find_run(run.client, "evaluate", evaluate)
    links = {"Fine-tuning": pages.run_page(run.experiment_id, parent.run_id)} if holds_run(parent.run_id) else {}
    return links if evaluation is None else links | links_of_evaluation(RunLog(run.client, evaluation))


def note_registration(run: RunLog, version: ModelVersion) -> None:
    """Note in the descriptions of a registration and of its fine-tuning which version it is."""
    text = notes.describe_registration(version.name, version.version, pages.version_page(version.name, version.version))
    for own in (run, run.parent()):
        if holds_run(own.run_id):
            own.describe("Registered", text)
