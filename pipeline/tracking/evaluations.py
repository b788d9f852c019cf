"""An evaluation's samples in MLflow: a trace per prompt with our figures, and the prompts as an evaluation data set.

So MLflow's page of evaluation runs shows the samples of two fine-tunings side by side, prompt by prompt.
"""

import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import SpanType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, FEATURE_DISABLED, NOT_IMPLEMENTED, ErrorCode

from pipeline.tracking.runs import RunLog, stage_tags
from pipeline.tracking.store import experiment_id, unless_set
from pipeline.tracking.tags import SAMPLES

FIGURES = ("rep_4", "longest_copy_tokens", "invented_words", "in_form")
"""The columns of `samples.jsonl` that are shown with each sample, by an MLflow scorer of that name."""
HUMAN = "human"
"""The system of `samples.jsonl` whose texts people wrote; and the name of the expectation that shows them."""
BAR = "Evaluating:"
"""How a line of MLflow's progress bar begins."""
_UNSUPPORTED = {ErrorCode.Name(code) for code in (ENDPOINT_NOT_FOUND, FEATURE_DISABLED, NOT_IMPLEMENTED)}


def record_samples(
    client: MlflowClient, name: str, model: str, rows: Sequence[Mapping[str, Any]], system: str
) -> RunLog | None:
    """Record a system's samples as traces of a new run, and return it. `rows` are those of `samples.jsonl`.

    The run is not under another, because MLflow's page of evaluation runs would not show it. Returns None, with a line
    that says so, if the store takes no evaluations: it is a folder of files, or a server older than MLflow 3.4.
    """
    written = {row["prompt"]: row["text"] for row in rows if row["system"] == HUMAN}
    drawn = {row["prompt"]: row for row in rows if row["system"] == system}
    experiment = experiment_id(client)
    try:
        dataset = _dataset(experiment, model, written)
    except MlflowException as error:
        if error.error_code not in _UNSUPPORTED:
            raise
        reason = str(error).splitlines()[0]
        print(
            f"the tracking store takes no evaluations; samples are in samples.jsonl alone ({reason})", file=sys.stderr
        )
        return None
    run_id = str(client.create_run(experiment, run_name=name, tags=stage_tags(SAMPLES)).info.run_id)
    _evaluate(run_id, dataset, drawn)
    traces = mlflow.search_traces(locations=[experiment], run_id=run_id, include_spans=False, return_type="list")
    if len(traces) < len(drawn):
        print(
            f"MLflow recorded {len(traces)} of {len(drawn)} samples; all are in samples.jsonl (do variables such as "
            "MLFLOW_TRACE_SAMPLING_RATIO or OTEL_SDK_DISABLED turn its traces off?)",
            file=sys.stderr,
        )
    return RunLog(client, run_id)


def _dataset(experiment: str, model: str, written: Mapping[str, str]) -> Any:
    """Return the evaluation data set of these prompts and people's texts, made if the store does not hold it."""
    # Imported here: it takes seconds, and a training does not need it.
    from mlflow.genai.datasets import create_dataset, search_datasets

    records = [{"inputs": {"prompt": prompt}, "expectations": {HUMAN: text}} for prompt, text in written.items()]
    digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    name = f"{model}: test prompts {digest[:8]}"
    found = search_datasets(experiment_ids=experiment, filter_string=f"name = '{name}'", max_results=1)
    dataset = found[0] if found else create_dataset(name=name, experiment_id=experiment)
    # Also if it was found: its process may have been killed before this. Records that it has stay.
    return dataset.merge_records(records)


def _evaluate(run_id: str, dataset: Any, drawn: Mapping[str, Mapping[str, Any]]) -> None:
    from mlflow import genai
    from mlflow.genai.scorers import scorer

    def scorer_of(figure: str) -> Any:
        def score(inputs: dict[str, str]) -> float | bool | None:
            # Somebody may have added a prompt to the data set.
            row = drawn.get(inputs["prompt"])
            return None if row is None else row[figure]

        return scorer(score, name=figure)

    @mlflow.trace(name="sample", span_type=SpanType.LLM)
    def continuation(prompt: str) -> str | None:
        row = drawn.get(prompt)
        return None if row is None else row["text"]

    settings = {
        # SQLite has one writer: more threads wait for each other for minutes.
        "MLFLOW_GENAI_EVAL_MAX_WORKERS": "1",
        "MLFLOW_GENAI_EVAL_MAX_SCORER_WORKERS": "1",
        # It would trace a sample once more to see whether it is traced.
        "MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION": "true",
    }
    with unless_set(settings), _without_banner(), mlflow.start_run(run_id=run_id):
        genai.evaluate(dataset, [scorer_of(figure) for figure in FIGURES], predict_fn=continuation)


@contextmanager
def _without_banner() -> Iterator[None]:
    """Leave out what MLflow says about itself and to notebooks and, unless on a terminal, its progress bar."""
    logging.getLogger("mlflow.models.evaluation.utils.trace").setLevel(logging.WARNING)
    lines = io.StringIO()
    with redirect_stdout(io.StringIO()):
        if sys.stderr.isatty():
            yield
            return
        try:
            with redirect_stderr(lines):
                yield
        finally:
            for line in lines.getvalue().replace("\r", "\n").splitlines():
                if line.strip() and not line.startswith(BAR):
                    print(line, file=sys.stderr)
