"""A span per request for completions, sent by OTLP to an MLflow server, to a collector, or to both.

Names are those of OpenTelemetry's conventions for generative AI; the server's own begin with `pipeline.`. No request
waits for the network: spans wait in a queue of bounded size, and a thread sends them. Only imported if requests are
traced.
"""

import json
import logging
import os
import re
import threading
import time
from asyncio import CancelledError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from pipeline.errors import UserError
from pipeline.serving.openai import ApiError, CompletionRequest, Outcome
from pipeline.serving.options import OTLP_PREFIX, SERVICE_VARIABLE, Tracing
from pipeline.serving.served import ServedModel
from pipeline.serving.thumbs import Thumbs
from pipeline.serving.worker import Delivery, Job
from pipeline.tracking import feedback, store
from pipeline.tracking.registry import RUN_TAG

SERVICE = "gpt2-pipeline"
OPERATION = "text_completion"
ID = re.compile(r"cmpl-([0-9a-f]{32})([0-9a-f]{16})")
"""The id of a traced completion: that of its trace, then that of its span."""
NAMED = {
    "max_new_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
}
"""The decoding parameters that the conventions have names for; others begin with `pipeline.request.`."""
UNSHOWN = ("logit_bias", "banned_token_ids", "allowed_token_ids", "stop_token_ids")
"""The decoding parameters that may have thousands of values."""
TAG = "mlflow.traceTag."
"""The prefix of the attributes that MLflow makes tags of the trace, by which its page can be searched."""
MOST_CHARACTERS = 20_000
"""The most characters of a request's prompts, and of its continuations, that a span shows: thousands of spans wait."""
FLUSH_S = 3.0
"""The longest time that is spent at the end on sending the spans that wait."""
FIRST_REDIRECTION = 300

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """What spans show of texts, and for whom."""

    has_texts: bool
    is_for_mlflow: bool
    is_for_collector: bool


class Traces:
    """The spans of a server.

    Raises `UserError` if they are to be sent to MLflow and its store does not answer, or if a variable is wrong.
    """

    def __init__(self, tracing: Tracing) -> None:
        # It would quote a header that it does not understand.
        logging.getLogger("opentelemetry.util.re").setLevel(logging.CRITICAL)
        resource = Resource.create({"service.name": os.environ.get(SERVICE_VARIABLE) or SERVICE})
        with _variable_errors():
            self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._tracer = self._provider.get_tracer("pipeline.serving")
        self._propagator = TraceContextTextMapPropagator()
        self._form = Form(tracing.has_texts, tracing.mlflow_url is not None, tracing.collector_url is not None)
        self._thumbs: Thumbs | None = None
        if tracing.mlflow_url is not None:
            client = store.connect(create=False)
            experiment_id = store.experiment_id(client)
            with _without_variables():
                processor = self._send(
                    tracing.mlflow_url,
                    endpoint=feedback.traces_url(tracing.mlflow_url),
                    headers=feedback.traces_headers(experiment_id),
                )
            self._thumbs = Thumbs(client, experiment_id, processor.force_flush)
        if tracing.collector_url is not None:
            self._send(tracing.collector_url)
        # Of a place that does not answer, the library writes several lines a batch, with all that its URL holds.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def _send(self, place: str, **options: Any) -> BatchSpanProcessor:
        """Send the spans to a place from now on. Unless options say where that is, the environment does."""
        with _variable_errors():
            processor = BatchSpanProcessor(_Announcing(place, **options))
        self._provider.add_span_processor(processor)
        return processor

    @property
    def takes_thumbs(self) -> bool:
        """Whether the traces go where feedback can be added to them."""
        return self._thumbs is not None

    def begin(self, asked: CompletionRequest, model: str, headers: Mapping[str, str]) -> "RequestSpan":
        """Begin the span of a request. It continues the caller's trace if the headers name one."""
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": OPERATION,
            "gen_ai.provider.name": SERVICE,
            "gen_ai.request.model": asked.model or model,
            "gen_ai.request.stream": bool(asked.stream),
        }
        if asked.preset is not None:
            attributes["pipeline.request.preset"] = asked.preset
        context = self._propagator.extract(headers)
        span = self._tracer.start_span(f"{OPERATION} {model}", context, SpanKind.SERVER, attributes)
        return RequestSpan(span, self._form)

    async def set_thumb(self, completion_id: str, index: int, value: bool | None) -> None:
        """Add feedback to the trace of a completion; None takes it back. Raises `ApiError`."""
        ids = ID.fullmatch(completion_id)
        if self._thumbs is None or ids is None or not await self._thumbs.set(ids[1], ids[2], index, value):
            raise ApiError(404, "id: no trace of such a completion", param="id")

    def close(self) -> None:
        """Send the spans that wait, for a bounded time."""
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(FLUSH_S)


class RequestSpan:
    """The span of a request. One that is not sampled takes note of nothing."""

    def __init__(self, span: Span, form: Form) -> None:
        context = span.get_span_context()
        self.completion_id = f"cmpl-{context.trace_id:032x}{context.span_id:016x}"
        self._span = span
        self._is_recording = span.is_recording()
        self._form = form
        self._job: Job | None = None
        self._first_token: float | None = None
        """The time of the first token (`time.perf_counter`)."""
        self._tokens = 0
        self._reasons: dict[int, str] = {}
        """The finish reasons of the choices that have ended."""
        self._texts: list[str] = []

    def describe(self, job: Job, model: ServedModel, prompt_tokens: int) -> None:
        """Add what is known of a request that is taken."""
        if not self._is_recording:
            return
        self._job = job
        name = model.name if model.version is None else f"{model.name}/{model.version}"
        attributes: dict[str, AttributeValue] = {
            "gen_ai.response.id": self.completion_id,
            "gen_ai.response.model": name,
            "openai.response.system_fingerprint": model.fingerprint,
            "gen_ai.usage.input_tokens": prompt_tokens,
        }
        for parameter, value in job.params.to_mapping().items():
            if parameter == "stop" and self._form.has_texts:
                attributes["gen_ai.request.stop_sequences"] = value
            elif parameter not in ("stop", *UNSHOWN):
                attributes[NAMED.get(parameter, f"pipeline.request.{parameter}")] = value
        if self._form.is_for_mlflow:
            attributes[f"{TAG}model_version"] = name
            run_id = model.files.lineage["run_id"]
            if run_id is not None:
                attributes[f"{TAG}{RUN_TAG}"] = run_id
        self._span.set_attributes(attributes)
        if self._form.has_texts:
            self._texts = [""] * job.choices
            prompts = _shorten([prompt.text for prompt in job.prompts])
            if self._form.is_for_collector:
                messages = [{"role": "user", "parts": [{"type": "text", "content": text}]} for text in prompts]
                self._span.set_attribute("gen_ai.input.messages", _json(messages))
            if self._form.is_for_mlflow:
                # Its page shows the text alone if the inputs are those of a chat.
                inputs = {"messages": [{"role": "user", "content": text} for text in prompts]}
                self._span.set_attribute("mlflow.spanInputs", _json(inputs))

    def take(self, delivery: Delivery) -> None:
        """Take note of what a step gives."""
        if not self._is_recording:
            return
        for piece in delivery.pieces:
            if piece.token_count:
                self._tokens += piece.token_count
                if self._first_token is None:
                    self._first_token = time.perf_counter()
            if piece.finish_reason is not None:
                self._reasons[piece.index] = piece.finish_reason
            if self._texts and len(self._texts[piece.index]) < MOST_CHARACTERS:
                self._texts[piece.index] += piece.text

    def end(self, outcome: Outcome, error: ApiError | None = None) -> None:
        """End the span as the request ended. To be called exactly once."""
        if self._is_recording:
            if self._job is not None:
                self._add_answer(self._job, outcome)
            if outcome not in ("completed", "cancelled"):
                self._span.set_attribute("error.type", outcome)
                self._span.set_status(StatusCode.ERROR, self._reason(error))
        self._span.end()

    def end_at_error(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """End the span of a request that was not taken; an exit callback, see `contextlib.ExitStack.push`."""
        if isinstance(error, ApiError):
            self.end(error.outcome, error)
        else:
            self.end("cancelled" if isinstance(error, CancelledError) else "failed")

    def _reason(self, error: ApiError | None) -> str | None:
        """Return why a request failed. What is said of a refused one may quote its texts."""
        if error is None:
            return None
        if error.outcome != "refused" or self._form.has_texts:
            return error.message
        return f"{error.status}" if error.param is None else f"{error.status}: {error.param}"

    def _add_answer(self, job: Job, outcome: Outcome) -> None:
        reasons = [self._reasons.get(index, outcome) for index in range(job.choices)]
        attributes: dict[str, AttributeValue] = {
            "gen_ai.response.finish_reasons": reasons,
            "gen_ai.usage.output_tokens": self._tokens,
        }
        if self._first_token is not None:
            attributes["gen_ai.server.time_to_first_token"] = self._first_token - job.began
        texts = _shorten(self._texts)
        if texts and self._form.is_for_collector:
            messages = [
                {"role": "assistant", "parts": [{"type": "text", "content": text}], "finish_reason": reason}
                for text, reason in zip(texts, reasons, strict=True)
            ]
            attributes["gen_ai.output.messages"] = _json(messages)
        if texts and self._form.is_for_mlflow:
            choices = [
                {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
                for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
            ]
            attributes["mlflow.spanOutputs"] = _json({"choices": choices})
        self._span.set_attributes(attributes)


class _Session(requests.Session):
    """A session that knows how its last request ended."""

    status = 0
    """The status of the answer; 0 if there was none."""
    ending = ""

    def request(self, *arguments: Any, **options: Any) -> requests.Response:
        try:
            response = super().request(*arguments, **options)
        except Exception as error:
            # Its text may contain the whole URL.
            self.status, self.ending = 0, f"does not answer ({type(error).__name__})"
            raise
        self.status, self.ending = response.status_code, f"answers {response.status_code}"
        return response


class _Announcing(SpanExporter):
    """Sends spans by OTLP, and says once that a place does not take them, and once that it does again."""

    def __init__(self, url: str, **options: Any) -> None:
        parts = urlsplit(url)
        # What else a URL has may be a secret.
        self._place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._is_lost = False
        self._session = _Session()
        self._exporter = OTLPSpanExporter(session=self._session, **options)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        # A redirection leads to a page for logging in, say, and not to whoever keeps the spans.
        is_lost = result is not SpanExportResult.SUCCESS or self._session.status >= FIRST_REDIRECTION
        if is_lost and not self._is_lost:
            ending = self._session.ending
            logger.warning("traces are lost: %s %s; requests are served all the same", self._place, ending)
        elif self._is_lost and not is_lost:
            logger.info("%s takes traces again", self._place)
        self._is_lost = is_lost
        return SpanExportResult.FAILURE if is_lost else SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def _variable_errors() -> Iterator[None]:
    """Turn an error of the library about its variables into a one-line `UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"OpenTelemetry's variables: {error}") from error


@contextmanager
def _without_variables() -> Iterator[None]:
    """Hide the variables of OTLP in a block: the headers in them are secrets of a collector."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(OTLP_PREFIX)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _shorten(texts: Sequence[str]) -> list[str]:
    """Return the beginnings of texts that have at most `MOST_CHARACTERS` together."""
    most = MOST_CHARACTERS // max(1, len(texts))
    return [text if len(text) <= most else f"{text[:most]}…" for text in texts]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
