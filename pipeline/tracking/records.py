"""Recording what a stage wrote in MLflow, from its files alone: as it ends, or later in a store that lacks it."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.curves import read_curve
from pipeline.files import read_json, read_jsonl
from pipeline.tracking.runs import RunLog, find_run, start_run

SPANS = ("copied_spans", "repeated_spans")
"""The columns of `samples.jsonl` that only the report shows."""


def parent_run(client: MlflowClient, finetune: Path, parameters: Mapping[str, Any]) -> str:
    """Return the id of the run that wrote `finetune`; if the store does not hold it, record one from these files.

    Such a run has the parameters, lineage, metrics and loss curves of the lost one, but not its samples.
    """
    found = find_run(client, "finetune", finetune)
    if found is not None:
        return found
    curves = {name: read_curve(finetune / f"loss_{name}.csv") for name in ("train", "validation")}
    print(f"the tracking store does not hold the run that wrote {finetune}; recording it again", file=sys.stderr)
    with start_run("finetune", parameters) as run:
        for name, points in curves.items():
            for step, loss in points:
                run.log_metrics({f"{name}_loss": loss}, step)
        record_finetuning(run, finetune)
    return run.run_id


def record_finetuning(run: RunLog, finetune: Path) -> None:
    """Record the figures of a finished fine-tuning."""
    run.log_scores("final", read_json(finetune / "details.json"))
    run.tag_outputs(finetune)


def record_search(run: RunLog, tune: Path) -> None:
    """Record what a finished search found. Its trials are runs of their own; those that `run` lacks are added."""
    trials = read_json(tune / "trials.json")
    recorded = run.trials()
    for trial in trials:
        if trial["number"] not in recorded:
            record_trial(run, trial)
    scores = {**read_json(tune / "metrics.json"), "trials": len(trials)}
    run.log_scores("tune", {**scores, "pruned": sum(trial["state"] == "pruned" for trial in trials)})
    for file in sorted(tune.iterdir()):
        run.log_file(file)
    run.tag_outputs(tune)


def record_trial(run: RunLog, trial: Mapping[str, Any], start_s: float | None = None) -> None:
    """Record a row of `trials.json` as a run of its own, and its distance as a point of the search's curve."""
    distances = {name: trial[name] for name in ("excess", "distance", "too_tame", "too_wild")}
    scores = {**trial["scores"], **distances}
    run.log_trial(trial["number"], trial["values"], scores, {"tune.state": trial["state"]}, start_s)
    if trial["state"] == "complete":
        run.log_metrics({"trial_distance": trial["distance"]}, trial["number"])


def record_evaluation(run: RunLog, evaluate: Path, parity: Path) -> None:
    """Record scores, samples, plots and report of an evaluation, and the parity of the engine that was evaluated."""
    for precision, found in read_json(parity).items():
        run.log_scores(f"parity.{precision}", found)
    run.log_file(parity)
    details = read_json(evaluate / "details.json")
    for group in ("documents", "systems"):
        for name, scores in details[group].items():
            run.log_scores(name, scores)
    run.log_scores("choice", details["choice"])
    run.log_scores("protocol", details["protocol"])
    engine = {f"engine.{name}": details["protocol"][name] for name in ("provider", "precision")}
    run.set_tags({**engine, "decoding.kept": details["choice"]["kept"]})
    run.log_table("decodings.json", decoding_rows(details["systems"]))
    rows = read_jsonl(evaluate / "samples.jsonl")
    shown = [{key: value for key, value in row.items() if key not in SPANS} for row in rows]
    run.log_table("samples.json", [{**row, "decoding": str(row["decoding"])} for row in shown])
    for file in sorted(evaluate.iterdir()):
        run.log_file(file)
    run.tag_outputs(evaluate)


def decoding_rows(systems: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row of figures per system; those that people's texts lack, such as a distance from people, are None."""
    columns = list(systems["hand_set"])
    return [{"system": name, **{column: own.get(column) for column in columns}} for name, own in systems.items()]
