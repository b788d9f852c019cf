"""The server's traces: in a receiver of OTLP, in an MLflow server, and the feedback on them."""

import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from isolated_store import STORE, isolated_store
from mlflow import MlflowClient
from mlflow.server.constants import BACKEND_STORE_URI_ENV_VAR
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from otlp_receiver import Receiver, receiving, values_of
from served_model import PATIENCE_S, SLOTS, Running, running_server, wait_for

from pipeline.errors import UserError
from pipeline.serving import thumbs
from pipeline.serving.app import FEEDBACK
from pipeline.serving.options import Access, Limits, Tracing, read_tracing
from pipeline.serving.traces import MOST_CHARACTERS, Traces
from pipeline.tracking.feedback import set_thumb

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ENDLESS = {"max_tokens": 100_000, "ignore_eos": True, "context_overflow": "slide"}
OTLP = "OTEL_EXPORTER_OTLP_"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    # Spans are sent at once.
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


Tracer = Callable[..., Running]


@pytest.fixture
def traced(tiny_engine_folder: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracer]:
    """Starts a server whose collector is the receiver."""
    monkeypatch.setenv(f"{OTLP}ENDPOINT", receiver.url)
    with ExitStack() as stack:

        def start(*, has_texts: bool = False, **options: Any) -> Running:
            tracing = read_tracing(None, has_texts=has_texts)
            assert tracing is not None
            traces = Traces(tracing)
            stack.callback(traces.close)
            return stack.enter_context(running_server(tiny_engine_folder, traces=traces, **options))

        yield start


def only(spans: list[Span]) -> tuple[Span, dict[str, Any]]:
    (span,) = spans
    return span, values_of(span.attributes)


def test_a_request_is_a_span(traced: Tracer, receiver: Receiver) -> None:
    running = traced()
    began = time.time_ns()
    fields = {"preset": "balanced", "top_p": 0.9, "seed": 3, "max_tokens": 9, "n": 2, "logit_bias": {"5": 1.0}}
    answer = running.post(prompt="The secret lamp", stop=["secret end"], **fields).json()
    span, found = only(receiver.wait_for_spans(1))
    ended = time.time_ns()
    assert began <= span.start_time_unix_nano < span.end_time_unix_nano <= ended
    assert span.name == "text_completion engine"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.parent_span_id == b""
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert answer["id"] == f"cmpl-{span.trace_id.hex()}{span.span_id.hex()}"
    first = found.pop("gen_ai.server.time_to_first_token")
    # It counts from the arrival of the request, a little before the span.
    assert 0 < first * 1e9 < ended - began
    usage = answer["usage"]
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "gpt2-pipeline",
        "gen_ai.request.model": "engine",
        "gen_ai.request.stream": False,
        "gen_ai.request.temperature": 0.9,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "engine",
        "gen_ai.response.finish_reasons": [choice["finish_reason"] for choice in answer["choices"]],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "openai.response.system_fingerprint": answer["system_fingerprint"],
        "pipeline.request.preset": "balanced",
        "pipeline.request.min_p": 0.02,
    }
    assert receiver.paths == ["/v1/traces"]
    assert receiver.resources[0]["service.name"] == "gpt2-pipeline"
    assert b"secret" not in receiver.bodies[0]


@pytest.mark.parametrize("stream", [False, True])
def test_texts_are_shown_if_asked_for(stream: bool, traced: Tracer, receiver: Receiver) -> None:
    running = traced(has_texts=True)
    asked = {"prompt": ["The lamp", "Éa"], "max_tokens": 8, "seed": 1, "stop": ["zz"]}
    whole = running.post(**asked).json()
    if stream:
        receiver.wait_for_spans(1)
        receiver.spans.clear()
        running.post(**asked, stream=True)
    _, found = only(receiver.wait_for_spans(1))
    assert found["gen_ai.request.stream"] is stream
    assert found["gen_ai.request.stop_sequences"] == ["zz"]
    assert json.loads(found["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": text}]} for text in asked["prompt"]
    ]
    assert json.loads(found["gen_ai.output.messages"]) == [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": choice["text"]}],
            "finish_reason": choice["finish_reason"],
        }
        for choice in whole["choices"]
    ]
    assert not any(name.startswith("mlflow.") for name in found)


def test_long_texts_are_cut(traced: Tracer, receiver: Receiver) -> None:
    running = traced(has_texts=True)
    long = "The lamp. " * MOST_CHARACTERS
    answer = running.post(prompt=long, context_overflow="slide", max_tokens=4, echo=True)
    assert len(answer.json()["choices"][0]["text"]) >= len(long)
    _, found = only(receiver.wait_for_spans(1))
    for name in ("gen_ai.input.messages", "gen_ai.output.messages"):
        (message,) = json.loads(found[name])
        assert message["parts"][0]["content"] == f"{long[:MOST_CHARACTERS]}…"


def test_errors_are_told_without_texts(traced: Tracer, receiver: Receiver) -> None:
    running = traced()
    assert running.post(prompt="The lamp", preset="secret").status_code == 400
    span, found = only(receiver.wait_for_spans(1))
    assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "400: preset")
    assert found["error.type"] == "refused"
    # What the API does not understand, or has no key for, is no request to the model.
    assert running.post(prompt=7).status_code == 400
    assert running.post(prompt="x", n=SLOTS + 9).status_code == 400
    assert [span.status.message for span in receiver.wait_for_spans(2)] == ["400: preset", "400: n"]


def test_errors_are_told_with_texts(traced: Tracer, receiver: Receiver) -> None:
    message = traced(has_texts=True).post(prompt="The lamp", top_p=2).json()["error"]["message"]
    span, _ = only(receiver.wait_for_spans(1))
    assert span.status.message == message == "top_p: 2.0 is out of range, must be in (0, 1]"


def test_a_request_that_takes_too_long(traced: Tracer, receiver: Receiver) -> None:
    running = traced(limits=Limits(timeout_s=1))
    assert running.post(prompt="The lamp", **ENDLESS).status_code == 504
    span, found = only(receiver.wait_for_spans(1))
    assert span.status.message == "the request took longer than 1 s"
    assert found["error.type"] == "timed_out"
    assert found["gen_ai.response.finish_reasons"] == ["timed_out"]


def test_a_full_queue(traced: Tracer, receiver: Receiver) -> None:
    running = traced(max_queue=0)
    body = {"prompt": ["The lamp"] * SLOTS, **ENDLESS, "stream": True}
    with requests.post(f"{running.url}/v1/completions", json=body, stream=True, timeout=PATIENCE_S) as response:
        # The connection is closed with this iterator.
        lines = response.iter_lines()
        next(lines)
        assert running.post(prompt="The lamp").status_code == 429
        span, found = only(list(receiver.wait_for_spans(1)))
    assert found["error.type"] == "rejected"
    assert span.status.message.startswith("the queue is full")


def test_a_client_that_leaves_is_no_error(traced: Tracer, receiver: Receiver) -> None:
    running = traced()
    body = {"prompt": "The lamp", **ENDLESS, "stream": True}
    with requests.post(f"{running.url}/v1/completions", json=body, stream=True, timeout=PATIENCE_S) as response:
        next(response.iter_lines())
    span, found = only(receiver.wait_for_spans(1))
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert found["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert found["gen_ai.usage.output_tokens"] >= 1


def test_the_callers_trace_continues(traced: Tracer, receiver: Receiver) -> None:
    running = traced()
    url, body = f"{running.url}/v1/completions", {"prompt": "The lamp", "max_tokens": 2}
    for flags in ("00", "01"):
        # A caller that does not record its trace does not want ours either.
        headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-{flags}"}
        answer = requests.post(url, json=body, headers=headers, timeout=PATIENCE_S).json()
    requests.post(url, json=body, headers={"traceparent": "00-nonsense"}, timeout=PATIENCE_S)
    first, second = receiver.wait_for_spans(2)
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert answer["id"] == f"cmpl-{TRACE_ID}{first.span_id.hex()}"
    assert second.trace_id.hex() != TRACE_ID


def test_opentelemetrys_variables_are_followed(
    traced: Tracer, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{OTLP}TRACES_ENDPOINT", f"{receiver.url}/own/path")
    monkeypatch.setenv(f"{OTLP}HEADERS", "api-key=abc")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "tales")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    running = traced(access=Access(keys=("a-key",)))
    headers = {"Authorization": "Bearer a-key"}
    body = {"prompt": "The lamp", "max_tokens": 2}
    assert requests.post(f"{running.url}/v1/completions", json=body, timeout=PATIENCE_S).status_code == 401
    requests.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S)
    only(receiver.wait_for_spans(1))
    assert receiver.paths == ["/own/path"]
    assert receiver.headers[0]["api-key"] == "abc"
    assert receiver.resources[0].items() >= {"service.name": "tales", "deployment.environment.name": "test"}.items()
    assert b"a-key" not in receiver.bodies[0]


def test_a_collector_that_fails_is_told_of_once(
    traced: Tracer, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline")
    receiver.status = 401
    monkeypatch.setenv(f"{OTLP}ENDPOINT", f"{receiver.url.replace('//', '//user:secret@')}/secret")
    running = traced()
    for count in (1, 2):
        assert running.post(prompt="The lamp", max_tokens=2).status_code == 200
        wait_for(lambda count=count: len(receiver.paths) >= count)
    receiver.status = 200
    wait_for(lambda: running.post(prompt="The lamp", max_tokens=2).ok and len(receiver.spans) > 0)
    wait_for(lambda: len(told(caplog)) == 2)
    assert told(caplog) == [
        f"traces are lost: {receiver.url} answers 401; requests are served all the same",
        f"{receiver.url} takes traces again",
    ]


def test_a_collector_that_is_away_is_told_of(
    traced: Tracer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv(f"{OTLP}ENDPOINT", url)
    # It is asked again for so long.
    monkeypatch.setenv(f"{OTLP}TIMEOUT", "0.1")
    assert traced().post(prompt="The lamp", max_tokens=2).status_code == 200
    wait_for(lambda: told(caplog) != [])
    (text,) = told(caplog)
    assert text == f"traces are lost: {url} does not answer (ConnectionError); requests are served all the same"


def test_a_wrong_variable_is_one_line(traced: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "5")
    with pytest.raises(UserError, match=r"^OpenTelemetry's variables: max_export_batch_size must be"):
        traced()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says about traces, or of anything with a secret."""
    return [text for text in caplog.messages if "traces" in text or "secret" in text]


def test_nobody_waits_for_a_collector_that_hangs(tiny_engine_folder: Path, receiver: Receiver) -> None:
    receiver.holds = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"{OTLP}ENDPOINT", receiver.url)
        traces = Traces(Tracing(collector_url=receiver.url))
    with running_server(tiny_engine_folder, traces=traces) as running:
        for _ in range(3):
            assert running.post(prompt="The lamp", max_tokens=2).status_code == 200
        wait_for(lambda: receiver.paths != [])
    traces.close()
    # It is not answered yet.
    assert receiver.spans == []


def test_what_waits_is_sent_at_the_end(
    tiny_engine_folder: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv(f"{OTLP}ENDPOINT", receiver.url)
    traces = Traces(Tracing(collector_url=receiver.url))
    with running_server(tiny_engine_folder, traces=traces) as running:
        for _ in range(3):
            running.post(prompt="The lamp", max_tokens=2)
    assert receiver.spans == []
    traces.close()
    assert len(receiver.spans) == 3


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({f"{OTLP}ENDPOINT": ""}, None),
        ({f"{OTLP}HEADERS": "a=b"}, None),
        ({f"{OTLP}ENDPOINT": "http://c:4318"}, Tracing(collector_url="http://c:4318")),
        ({f"{OTLP}TRACES_ENDPOINT": "https://c/x"}, Tracing(collector_url="https://c/x")),
        ({f"{OTLP}ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({f"{OTLP}ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "True"}, None),
    ],
)
def test_the_variables_turn_traces_on(
    variables: dict[str, str], expected: Tracing | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_tracing(None, has_texts=False) == expected
    if "OTEL_SDK_DISABLED" not in variables:
        found = read_tracing("http://m:5000", has_texts=True)
        assert found == Tracing("http://m:5000", expected.collector_url if expected else None, has_texts=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "--trace-texts: nothing is traced; add --trace, or set OTEL_EXPORTER_OTLP_ENDPOINT"),
        (
            {f"{OTLP}ENDPOINT": "http://c:4317", f"{OTLP}PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: grpc is not supported; set http/protobuf, and its port, 4318",
        ),
        (
            {f"{OTLP}ENDPOINT": "localhost:4318"},
            "OTEL_EXPORTER_OTLP_ENDPOINT: is not an address such as http://localhost:4318",
        ),
    ],
)
def test_what_is_not_supported_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        read_tracing(None, has_texts=True)


def test_a_disabled_sdk_contradicts_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with pytest.raises(UserError, match=r"^--trace: OTEL_SDK_DISABLED is true"):
        read_tracing("http://m:5000", has_texts=False)


def test_nothing_is_imported_unless_requests_are_traced() -> None:
    unwanted = ("pipeline.serving.traces", "opentelemetry.exporter")
    code = f"import sys, pipeline.serving.server\nprint([name for name in sys.modules if name.startswith({unwanted})])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_without_traces_there_is_no_feedback(tiny_engine_folder: Path) -> None:
    with running_server(tiny_engine_folder) as running:
        answer = requests.post(f"{running.url}{FEEDBACK}", json={"id": "cmpl-1", "value": True}, timeout=PATIENCE_S)
        assert answer.status_code == 404
        assert "feedback" not in requests.get(f"{running.url}/v1/models", timeout=PATIENCE_S).json()
        assert re.fullmatch("cmpl-[0-9a-f]{24}", running.post(prompt="x", max_tokens=1).json()["id"])


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run MLflow's server, without the process that only watches it, on a project's store, and yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{folder / STORE}"}
    command = [sys.executable, "-m", "uvicorn", "mlflow.server.fastapi_app:app", "--port", str(port)]
    with (folder / "mlflow.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            wait_for(lambda: _answers(url) or process.poll() is not None, 120)
            yield url
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=PATIENCE_S).ok
    except requests.ConnectionError:
        return False


def thumbs_of(client: MlflowClient, experiment_id: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return the feedback on each trace that has any: name, value, source and index."""
    traces = client.search_traces(locations=[experiment_id], include_spans=False)
    return {
        trace.info.trace_id: [
            (each.name, each.value, each.source.source_type, each.metadata["index"]) for each in trace.info.assessments
        ]
        for trace in traces
        if trace.info.assessments
    }


def test_mlflow_shows_traces_and_takes_feedback(
    tiny_engine_folder: Path, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv(f"{OTLP}ENDPOINT", receiver.url)
    monkeypatch.setenv(f"{OTLP}HEADERS", "api-key=secret")
    with isolated_store(tmp_path), mlflow_server(tmp_path) as mlflow_url:
        traces = Traces(Tracing(mlflow_url, receiver.url, has_texts=True))
        with running_server(tiny_engine_folder, traces=traces) as running:
            client = MlflowClient()
            experiment = client.get_experiment_by_name("gpt2-pipeline")
            assert experiment is not None
            assert requests.get(f"{running.url}/v1/models", timeout=PATIENCE_S).json()["feedback"] is True
            answer = running.post(prompt="The lamp", max_tokens=6, n=2).json()
            running.post(prompt="The lamp", top_p=2)

            def give(status: int = 200, **body: Any) -> dict[str, Any]:
                found = requests.post(f"{running.url}{FEEDBACK}", json=body, timeout=PATIENCE_S)
                assert found.status_code == status, found.text
                return dict(found.json())

            # The span still waits to be sent.
            trace_id = f"tr-{answer['id'][5:37]}"
            assert give(id=answer["id"], value=True) == {
                **{"object": "feedback", "id": answer["id"]},
                **{"index": 0, "value": True},
            }
            assert thumbs_of(client, experiment.experiment_id) == {trace_id: [("thumb", True, "HUMAN", "0")]}
            give(id=answer["id"], value=False)
            give(id=answer["id"], index=1, value=True)
            found = thumbs_of(client, experiment.experiment_id)[trace_id]
            assert sorted(found, key=str) == [("thumb", False, "HUMAN", "0"), ("thumb", True, "HUMAN", "1")]
            give(id=answer["id"], value=None)
            give(id=answer["id"], index=1, value=None)
            assert thumbs_of(client, experiment.experiment_id) == {}
            # As where the store is an MLflow server.
            mlflow.set_tracking_uri(mlflow_url)
            client = MlflowClient(mlflow_url)
            for value in (False, True):
                assert set_thumb(client, experiment.experiment_id, answer["id"][5:37], answer["id"][37:], 0, value)
                assert thumbs_of(client, experiment.experiment_id) == {trace_id: [("thumb", value, "HUMAN", "0")]}
            assert not set_thumb(client, "0", answer["id"][5:37], answer["id"][37:], 0, True)

            for wrong in ("cmpl-1", f"cmpl-{TRACE_ID}{SPAN_ID}", "' OR 1=1 --"):
                assert give(404, id=wrong, value=True)["error"]["param"] == "id"
            assert give(400, id=answer["id"])["error"]["message"] == "value: field required"
            assert give(400, id=answer["id"], value="yes")["error"]["param"] == "value"
            assert give(400, id=answer["id"], value=True, index=-1)["error"]["param"] == "index"
        traces.close()

        refused, taken = client.search_traces(locations=[experiment.experiment_id])
        assert taken.info.trace_id == trace_id
        assert taken.info.state == "OK"
        assert taken.info.request_preview == "The lamp"
        assert taken.info.response_preview == answer["choices"][0]["text"]
        usage = answer["usage"]
        assert taken.info.token_usage == {
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"],
        }
        assert taken.info.tags["model_version"] == "engine"
        assert taken.info.tags["service.name"] == "gpt2-pipeline"
        (span,) = taken.data.spans
        assert (span.name, span.span_type, span.model_name) == ("text_completion engine", "LLM", "engine")
        assert refused.info.state == "ERROR"
        assert refused.data.spans[0].status.description.startswith("top_p: 2.0 is out of range")
    # Each place has its own headers, and both have the same spans.
    assert {headers["api-key"] for headers in receiver.headers} == {"secret"}
    assert len(receiver.spans) == 2
    assert "x-mlflow-experiment-id" not in receiver.headers[0]


def test_mlflow_gets_no_secrets_of_the_collector(
    tmp_path: Path, tiny_engine_folder: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{OTLP}HEADERS", "api-key=secret")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    with isolated_store(tmp_path):
        traces = Traces(Tracing(receiver.url))
        with running_server(tiny_engine_folder, traces=traces) as running:
            running.post(prompt="The lamp", max_tokens=2)
            receiver.wait_for_spans(1)
        traces.close()
        experiment = MlflowClient().get_experiment_by_name("gpt2-pipeline")
        assert experiment is not None
    (headers,) = receiver.headers
    assert headers["x-mlflow-experiment-id"] == experiment.experiment_id
    assert headers["authorization"] == "Bearer token"
    assert "api-key" not in headers
    assert os.environ[f"{OTLP}HEADERS"] == "api-key=secret"


def test_feedback_that_mlflow_does_not_take(
    tmp_path: Path, tiny_engine_folder: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    with isolated_store(tmp_path):
        traces = Traces(Tracing(receiver.url))
        with running_server(tiny_engine_folder, traces=traces) as running:
            completion_id = running.post(prompt="The lamp", max_tokens=2).json()["id"]
            with closing(sqlite3.connect(tmp_path / STORE)) as database, database:
                database.execute("DROP TABLE trace_info")
            body = {"id": completion_id, "value": True}
            answer = requests.post(f"{running.url}{FEEDBACK}", json=body, timeout=PATIENCE_S)
        traces.close()
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "MLflow does not take feedback now; the server's log says why"
    (text,) = [text for text in caplog.messages if text.startswith("MLflow does not take feedback: ")]
    assert "\n" not in text


def test_feedback_does_not_wait_for_a_store_that_hangs(
    tmp_path: Path, tiny_engine_folder: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thumbs, "MOST_WAITING", 1)
    monkeypatch.setattr(thumbs, "TIMEOUT_S", 0.05)
    receiver.holds = True
    with isolated_store(tmp_path):
        traces = Traces(Tracing(receiver.url))
        with running_server(tiny_engine_folder, traces=traces) as running:
            completion_id = running.post(prompt="The lamp", max_tokens=2).json()["id"]

            def give() -> requests.Response:
                body = {"id": completion_id, "value": True}
                return requests.post(f"{running.url}{FEEDBACK}", json=body, timeout=PATIENCE_S)

            assert give().status_code == 504
            full = give()
            assert full.status_code == 429
            assert "Retry-After" in full.headers
            assert running.post(prompt="The lamp", max_tokens=2).status_code == 200
        receiver.over.set()
        traces.close()


def test_a_store_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated_store(tmp_path):
        (tmp_path / STORE).unlink()
        with pytest.raises(UserError, match="there is no tracking store here"):
            Traces(Tracing("http://127.0.0.1:5000"))
