"""Feedback on the traces of an experiment, and what MLflow's endpoint for traces wants in a request."""

from mlflow import MlflowClient, delete_assessment, log_feedback
from mlflow.entities import AssessmentSource, TraceInfo
from mlflow.tracing.utils.otlp import OTLP_TRACES_PATH, build_otlp_headers

THUMB = "thumb"
"""The name of the feedback that says whether a continuation is good."""
INDEX = "index"
"""The key of its metadata that says which continuation of a request it is about."""
SOURCE = AssessmentSource("HUMAN", "playground")


def traces_url(server: str) -> str:
    """Return where an MLflow server takes traces by OTLP."""
    return server.rstrip("/") + OTLP_TRACES_PATH


def traces_headers(experiment_id: str) -> dict[str, str]:
    """Return the headers of a request that adds traces to an experiment, with the credentials of the tracking store."""
    return dict(build_otlp_headers(experiment_id))


def set_thumb(
    client: MlflowClient, experiment_id: str, trace_id: str, span_id: str, index: int, value: bool | None
) -> bool:
    """Say whether continuation `index` of the request with this span (ids in hex) is good; None takes that back.

    Return whether the experiment has the trace.
    """
    info = _find_trace(client, experiment_id, f"tr-{trace_id}")
    if info is None:
        return False
    for own in info.assessments:
        is_thumb = (own.name, own.source, own.span_id) == (THUMB, SOURCE, span_id)
        if is_thumb and (own.metadata or {}).get(INDEX) == str(index):
            delete_assessment(trace_id=info.trace_id, assessment_id=str(own.assessment_id))
    if value is not None:
        log_feedback(
            trace_id=info.trace_id,
            name=THUMB,
            value=value,
            source=SOURCE,
            metadata={INDEX: str(index)},
            span_id=span_id,
        )
    return True


def _find_trace(client: MlflowClient, experiment_id: str, trace_id: str) -> TraceInfo | None:
    found = client.search_traces(
        locations=[experiment_id], filter_string=f"request_id = '{trace_id}'", max_results=1, include_spans=False
    )
    return found[0].info if found else None
