"""Recording what a stage wrote in MLflow, from its files alone: as it ends, or later in a store that lacks it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.curves import read_curve
from pipeline.files import read_json, read_jsonl
from pipeline.tracking import lineage, notes, pages
from pipeline.tracking.evaluations import record_samples
from pipeline.tracking.runs import RunLog, find_run, start_run

SAMPLES_TAG = "pipeline.samples_run_id"
"""The tag of an evaluation that names the run with its samples."""
TEST = "test"
"""The name of the test split as a data set of runs."""


def parent_run(client: MlflowClient, finetune: Path, parameters: Mapping[str, Any]) -> str:
    """Return the id of the run that wrote `finetune`; if the store does not hold it, record one from these files.

    Such a run has the parameters, lineage, metrics and loss curves of the lost one, but not its samples.
    """
    found = find_run(client, "finetune", finetune)
    if found is not None:
        return found
    curves = {name: read_curve(finetune / f"loss_{name}.csv") for name in ("train", "validation")}
    with start_run("finetune", parameters, restored=finetune) as run:
        for step, loss in curves["train"]:
            run.log_metrics({"train_loss": loss}, step)
        for step, loss in curves["validation"]:
            run.log_checkpoint(step, {"validation_loss": loss})
        record_finetuning(run, finetune, parameters)
    return run.run_id


def record_finetuning(run: RunLog, finetune: Path, parameters: Mapping[str, Any]) -> None:
    """Record the figures of a finished fine-tuning."""
    details = read_json(finetune / "details.json")
    run.log_scores("final", details)
    run.tag_best(details["best_step"])
    changes = lineage.changes(parameters)
    listed = ", ".join(f"{name} `{value}`" for name, value in changes.items())
    text = notes.describe_finetuning(details, listed, notes.how_to_make_again(run.tags()))
    run.describe("Fine-tuning", text)
    run.tag_outputs(finetune)


def record_search(run: RunLog, tune: Path) -> None:
    """Record what a finished search found. Its trials are runs of their own; those that `run` lacks are added."""
    trials, metrics = read_json(tune / "trials.json"), read_json(tune / "metrics.json")
    recorded = run.trials()
    for trial in trials:
        if trial["number"] not in recorded:
            record_trial(run, trial)
    pruned = sum(trial["state"] == "pruned" for trial in trials)
    run.log_scores("tune", {**metrics, "trials": len(trials), "pruned": pruned})
    for file in sorted(tune.iterdir()):
        run.log_file(file)
    text = notes.describe_search(trials, metrics, read_json(tune / "found.json")["balanced"])
    parent = run.parent()
    parent.log_metrics(metrics)
    for own in (run, parent):
        own.describe("Decoding", text)
    run.tag_outputs(tune)


def record_trial(run: RunLog, trial: Mapping[str, Any], start_s: float | None = None) -> None:
    """Record a row of `trials.json` as a run of its own, and its distance as a point of the search's curve."""
    distances = {name: trial[name] for name in ("excess", "distance", "too_tame", "too_wild")}
    scores = {**trial["scores"], **distances}
    run.log_trial(trial["number"], trial["values"], scores, {"tune.state": trial["state"]}, start_s)
    if trial["state"] == "complete":
        run.log_metrics({"trial_distance": trial["distance"]}, trial["number"])


def record_evaluation(run: RunLog, evaluate: Path, parity: Path, test: Path, parameters: Mapping[str, Any]) -> None:
    """Record the scores, plots and report of an evaluation, the parity of its engine, and its samples.

    `test` holds the documents of the test split.
    """
    details, metrics = read_json(evaluate / "details.json"), read_json(evaluate / "metrics.json")
    run.log_metrics(metrics)
    for precision, found in read_json(parity).items():
        run.log_scores(f"parity.{precision}", found)
    run.log_file(parity)
    run.log_dataset(
        TEST, lineage.digest_texts(test), {"split": TEST, "documents": str(details["protocol"]["documents"])}
    )
    for group in ("documents", "systems"):
        for name, scores in details[group].items():
            run.log_scores(name, scores)
    run.log_scores("choice", details["choice"])
    run.log_scores("protocol", details["protocol"])
    kept = details["choice"]["kept"]
    engine = {f"engine.{name}": details["protocol"][name] for name in ("provider", "precision")}
    run.set_tags({**engine, "decoding.kept": kept})
    run.log_table("decodings.json", decoding_rows(details["systems"]))
    for file in sorted(evaluate.iterdir()):
        run.log_file(file)
    parent = run.parent()
    parent.log_metrics(metrics)
    rows = list(read_jsonl(evaluate / "samples.jsonl"))
    samples = record_samples(run.client, parent.name, parameters["register"]["name"], rows, kept)
    if samples is not None:
        samples.log_metrics(metrics)
        samples.log_params(read_json(evaluate / "decoding.json"))
        run.set_tags({SAMPLES_TAG: samples.run_id})
    text = notes.describe_evaluation(details, links_of_evaluation(run))
    for own in (run, parent):
        own.describe("Evaluation", text)
    run.tag_outputs(evaluate)


def links_of_evaluation(run: RunLog) -> dict[str, str]:
    """Return the pages of an evaluation, by their titles."""
    links = {"Report": pages.file_page(run.experiment_id, run.run_id, "report.html")}
    samples = run.tags().get(SAMPLES_TAG)
    return links | ({"Samples, prompt by prompt": pages.samples_page(run.experiment_id, samples)} if samples else {})


def decoding_rows(systems: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row of figures per system; those that people's texts lack, such as a distance from people, are None."""
    columns = list(systems["hand_set"])
    return [{"system": name, **{column: own.get(column) for column in columns}} for name, own in systems.items()]
