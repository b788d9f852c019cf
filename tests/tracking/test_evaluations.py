"""The samples of an evaluation as traces, beside people's texts, in a real store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from isolated_store import isolated_store
from mlflow import MlflowClient
from mlflow.genai.datasets import search_datasets

from pipeline.tracking import runs, store
from pipeline.tracking.evaluations import FIGURES, record_samples


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path) -> Iterator[None]:
    with isolated_store(tmp_path):
        yield


def row(system: str, prompt: str, text: str, **figures: float) -> dict[str, Any]:
    return {"system": system, "prompt": prompt, "text": text, **dict.fromkeys(FIGURES, 0.0), **figures}


HUMAN = [row("human", "Once", " upon a time."), row("human", "The lamp", " went out.")]
TUNED = [
    row("tuned", "Once", " and again.", rep_4=0.25, longest_copy_tokens=3, in_form=True),
    row("tuned", "The lamp", " lampt.", rep_4=0.75, invented_words=1, in_form=False),
]


def traces_of(client: MlflowClient, run: runs.RunLog) -> dict[str, Any]:
    found = mlflow.search_traces(locations=[store.experiment_id(client)], run_id=run.run_id, return_type="list")
    return {trace.data.spans[0].inputs["prompt"]: trace for trace in found}


def test_each_sample_is_a_trace_with_its_figures_and_the_persons_text(capsys: pytest.CaptureFixture[str]) -> None:
    # With it imported, MLflow says that it traces it, once in each process.
    import openai  # noqa: F401

    client = store.connect()
    run = record_samples(client, "tales: epochs 5", "tales", HUMAN + TUNED, "tuned")
    assert run is not None
    found = client.get_run(run.run_id)
    assert (found.info.run_name, found.info.status) == ("tales: epochs 5", "FINISHED")
    # MLflow's page of evaluation runs shows no run that is under another.
    assert found.data.tags["mlflow.runType"] == "genai_evaluate"
    assert "mlflow.parentRunId" not in found.data.tags
    assert found.data.metrics["rep_4/mean"] == 0.5
    traces = traces_of(client, run)
    assert {prompt: trace.data.spans[0].outputs for prompt, trace in traces.items()} == {
        "Once": " and again.",
        "The lamp": " lampt.",
    }
    assessments = {own.name: own.value for own in traces["The lamp"].info.assessments}
    assert assessments == {
        "rep_4": 0.75,
        "longest_copy_tokens": 0.0,
        "invented_words": 1,
        "in_form": False,
        "human": " went out.",
    }
    # Neither MLflow's banner nor its progress bar, which would fill a log.
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_fine_tunings_share_the_data_set_of_the_same_prompts() -> None:
    client = store.connect()
    experiment = store.experiment_id(client)
    made = [record_samples(client, name, "tales", HUMAN + TUNED, "tuned") for name in ("one", "two")]
    (dataset,) = search_datasets(experiment_ids=experiment)
    records = {record["inputs"]["prompt"]: record["expectations"] for record in dataset.to_df().to_dict("records")}
    assert records == {"Once": {"human": " upon a time."}, "The lamp": {"human": " went out."}}
    names = [client.get_run(run.run_id).inputs.dataset_inputs[0].dataset.name for run in made if run is not None]
    assert names == [dataset.name] * 2
    record_samples(client, "three", "tales", [row("human", "Once", " more."), *TUNED], "tuned")
    assert len(search_datasets(experiment_ids=experiment)) == 2


def test_a_prompt_that_comes_twice_is_shown_once() -> None:
    client = store.connect()
    rows = [*HUMAN, row("human", "Once", " more."), *TUNED, row("tuned", "Once", " more and more.")]
    run = record_samples(client, "tales", "tales", rows, "tuned")
    assert run is not None
    traces = traces_of(client, run)
    assert {prompt: trace.data.spans[0].outputs for prompt, trace in traces.items()} == {
        "Once": " more and more.",
        "The lamp": " lampt.",
    }
    # The same person's text belongs to it.
    (human,) = [own.value for own in traces["Once"].info.assessments if own.name == "human"]
    assert human == " more."


def test_a_prompt_that_somebody_added_to_the_data_set_spoils_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    client = store.connect()
    record_samples(client, "one", "tales", HUMAN + TUNED, "tuned")
    (dataset,) = search_datasets(experiment_ids=store.experiment_id(client))
    dataset.merge_records([{"inputs": {"prompt": "Mine"}}])
    run = record_samples(client, "two", "tales", HUMAN + TUNED, "tuned")
    assert run is not None
    assert client.get_run(run.run_id).data.metrics["rep_4/mean"] == 0.5
    assert capsys.readouterr().err == ""


def test_traces_that_are_turned_off_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    mlflow.tracing.reset()
    record_samples(store.connect(), "tales", "tales", HUMAN + TUNED, "tuned")
    monkeypatch.delenv("MLFLOW_TRACE_SAMPLING_RATIO")
    mlflow.tracing.reset()
    assert "MLflow recorded 0 of 2 samples; all are in samples.jsonl" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_store_without_evaluations_gets_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    client = store.connect()
    assert record_samples(client, "tales", "tales", HUMAN + TUNED, "tuned") is None
    assert capsys.readouterr().err.startswith(
        "the tracking store takes no evaluations; samples are in samples.jsonl alone ("
    )
