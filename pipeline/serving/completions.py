"""A request for completions, from its checks to its last token, and its answer: whole, or as server-sent events."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from pipeline.engine.text import Piece, join_pieces, report_logprobs
from pipeline.errors import UserError
from pipeline.serving.metrics import Metrics
from pipeline.serving.openai import ApiError, CompletionRequest, Outcome, StreamOptions, to_api_error
from pipeline.serving.options import Limits
from pipeline.serving.served import Served, ServedModel
from pipeline.serving.shapes import shorten
from pipeline.serving.worker import Delivery, Job, Prompt, QueueFullError, Worker, ids_prompt, text_prompt

if TYPE_CHECKING:
    from pipeline.serving.traces import RequestSpan

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that keep proxies from holding a stream back."""
JSON = "application/json"
PART = 500
"""The number of elements of a list that are written at a time."""
LARGE_SIZE = 20_000
"""The characters of a text, or its token ids, from which on it is large."""
_LARGE = ThreadPoolExecutor(1, "large texts")
LAST_EVENT_SECONDS = 1.0
"""How long a client that has timed out may take to read why."""

logger = logging.getLogger(__name__)


class Call:
    """A request for completions that the engine works on; it holds its model until it is closed."""

    def __init__(
        self,
        asked: CompletionRequest,
        model: ServedModel,
        job: Job,
        deliveries: "asyncio.Queue[Delivery | Exception]",
        *,
        metrics: Metrics,
        timeout_s: float,
        release: Callable[[], None],
        span: "RequestSpan | None",
    ) -> None:
        self.asked = asked
        self.job = job
        self.completion_tokens = 0
        self.errors: list[ApiError] = []
        """The errors of the choices that failed."""
        self._model = model
        self._deliveries = deliveries
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._release = release
        self._span = span
        self._id = f"cmpl-{secrets.token_hex(12)}" if span is None else span.completion_id
        self._created = int(time.time())

    @property
    def prompt_tokens(self) -> int:
        """The tokens that the model reads, with the end-of-text before each text."""
        return sum(len(prompt.ids) for prompt in self.job.prompts)

    @property
    def remaining_s(self) -> float:
        """The time until the request times out; negative once it has."""
        return self.job.began + self._timeout_s - time.perf_counter()

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    @property
    def outcome(self) -> Outcome:
        """How a call has ended that was answered to its end."""
        return self.errors[0].outcome if self.errors else "completed"

    async def deliveries(self) -> AsyncIterator[Delivery]:
        """Yield what each step gives until the last choice has ended. Raises `ApiError`, as when every choice fails."""
        is_last = False
        while not is_last:
            try:
                async with asyncio.timeout(self.remaining_s):
                    delivery = await self._deliveries.get()
            except TimeoutError:
                text = f"the request took longer than {self._timeout_s:g} s"
                raise ApiError(504, text, code="timeout", outcome="timed_out") from None
            if isinstance(delivery, Exception):
                raise _engine_error(delivery)
            if self._span is not None:
                self._span.take(delivery)
            self.completion_tokens += sum(piece.token_count for piece in delivery.pieces)
            self.errors += [_engine_error(piece.error) for piece in delivery.pieces if piece.error is not None]
            if len(self.errors) == self.job.choices:
                raise self.errors[0]
            yield delivery
            is_last = delivery.is_last

    def close(self, outcome: Outcome, error: ApiError | None = None) -> None:
        """Free what the call holds, and count how it ended: by an error of it all, or of choices. Call exactly once."""
        self._model.worker.cancel(self.job)
        self._metrics.requests.labels(outcome).inc()
        if self._span is not None:
            self._span.end(outcome, error or next(iter(self.errors), None))
        self._release()

    def body(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        body = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.fingerprint,
            "choices": choices,
        }
        return body if usage is None else {**body, "usage": usage}


async def begin_call(
    asked: CompletionRequest,
    served: Served,
    metrics: Metrics,
    limits: Limits,
    *,
    client: str,
    arrived: float,
    span: "RequestSpan | None" = None,
) -> Call:
    """Check a request of `client` that arrived at `arrived` (`time.perf_counter`) and submit it. Raises `ApiError`."""
    with ExitStack() as on_error:
        if span is not None:
            on_error.push(span.end_at_error)
        if not served.ready:
            raise ApiError(503, "the server is shutting down", outcome="rejected", headers={"Retry-After": "5"})
        model = served.acquire()
        release = partial(served.release, model)
        on_error.callback(release)
        check_name(asked.model, model)
        params = asked.sampling(model.files.decoding, limits.max_tokens)
        draws = asked.max_tokens != 0
        scores = bool(asked.echo) and asked.logprobs is not None
        try:
            # Before any work for prompts that could never be taken.
            model.worker.check(len(asked.prompts()), params)
            slides = params.context_overflow == "slide" and not scores
            if not slides:
                for entry in asked.prompts():
                    _check_length(entry, model, can_slide=not scores)
            prompts = [await _read_prompt(entry, model, slides=slides) for entry in asked.prompts()]
            if draws:
                model.generator.check([prompt.ids for prompt in prompts], params)
            for prompt in prompts if scores else ():
                model.generator.engine.check_text(prompt.ids, "prompt")
        except UserError as error:
            raise to_api_error(error) from error
        loop = asyncio.get_running_loop()
        deliveries: asyncio.Queue[Delivery | Exception] = asyncio.Queue()

        def deliver(delivery: Delivery | Exception) -> None:
            loop.call_soon_threadsafe(deliveries.put_nowait, delivery)

        job = Job(prompts, params, deliver, echo=bool(asked.echo), draws=draws, client=client, began=arrived)
        call = Call(
            asked, model, job, deliveries, metrics=metrics, timeout_s=limits.timeout_s, release=release, span=span
        )
        if span is not None:
            span.describe(job, model, call.prompt_tokens)
        _submit(model.worker, job)
        # From here on the call releases the model when it is closed.
        on_error.pop_all()
    metrics.prompt_tokens.inc(call.prompt_tokens)
    return call


def check_name(name: str | None, model: ServedModel) -> None:
    """Raise `ApiError` if a request asks for a model other than the one that is served."""
    if name not in (None, model.name, f"{model.name}/{model.version}"):
        text = f"model: {shorten(repr(name))} is not served here, {model.name} is"
        raise ApiError(404, text, param="model", code="model_not_found")


async def answer_whole(call: Call, request: Request) -> Response:
    """Answer with all choices at once; stop the engine if the client disconnects meanwhile."""
    outcome: Outcome = "failed"
    failure = None
    collecting = asyncio.ensure_future(_collect(call))
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            # Nobody reads this response.
            outcome = "cancelled"
            return Response(status_code=499)
        answer = collecting.result()
        outcome = call.outcome
        return answer
    except ApiError as error:
        outcome, failure = error.outcome, error
        return error_response(error)
    except asyncio.CancelledError:
        outcome = "cancelled"
        raise
    finally:
        for task in (collecting, leaving):
            task.cancel()
        call.close(outcome, failure)


async def _collect(call: Call) -> Response:
    """Return the whole answer. Raises `ApiError`."""
    gained: list[list[Piece]] = [[] for _ in range(call.job.choices)]
    async for delivery in call.deliveries():
        for piece in delivery.pieces:
            gained[piece.index].append(piece)
    choices = [_choice_body(join_pieces(own), reports=call.asked.logprobs is not None) for own in gained]
    return await json_answer(call.body(choices, call.usage))


class EventStream(StreamingResponse):
    """A call as server-sent events: one per piece of a choice, the last one with the usage, then `[DONE]`."""

    def __init__(self, call: Call) -> None:
        super().__init__(self._events(call), media_type="text/event-stream", headers=STREAM_HEADERS)
        self._call = call
        self._outcome: Outcome = "cancelled"
        self._error: ApiError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            # Waits while the client does not read. One that reads slowly is sent why its stream ends.
            async with asyncio.timeout(max(0, self._call.remaining_s) + LAST_EVENT_SECONDS):
                await send(message)

        try:
            # A client that disconnects cancels this, even before the first event.
            await super().__call__(scope, receive, send_in_time)
        except (TimeoutError, ClientDisconnect):
            if self._call.remaining_s <= 0:
                self._outcome = "timed_out"
        finally:
            self._call.close(self._outcome, self._error)

    async def _events(self, call: Call) -> AsyncIterator[bytes]:
        reports = call.asked.logprobs is not None
        options = call.asked.stream_options or StreamOptions()
        try:
            async for delivery in call.deliveries():
                pieces = [
                    piece for piece in delivery.pieces if piece.text or piece.tokens or piece.finish_reason is not None
                ]
                events = []
                for piece in pieces:
                    ends_job = delivery.is_last and piece is pieces[-1]
                    has_usage = ends_job or options.continuous_usage_stats
                    choice = _choice_body(piece, reports=reports)
                    body = call.body([choice], call.usage if has_usage else None)
                    # The echo of a prompt may be large.
                    events.append(_event(await to_json(body) if len(piece.tokens) > PART else json.dumps(body)))
                if events:
                    yield b"".join(events)
        except ApiError as error:
            self._outcome, self._error = error.outcome, error
            yield _event(json.dumps(error.body()))
            return
        if options.include_usage:
            yield _event(json.dumps(call.body([], call.usage)))
        yield b"data: [DONE]\n\n"
        self._outcome = call.outcome


async def json_answer(body: dict[str, Any]) -> Response:
    """Answer with a body that may be large, without holding up others."""
    return Response(await to_json(body), media_type=JSON)


async def to_json(value: Any) -> str:
    """Return a value as JSON, and let others be answered between the parts of its lists."""
    if isinstance(value, dict):
        return "{" + ", ".join([f"{json.dumps(name)}: {await to_json(one)}" for name, one in value.items()]) + "}"
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    if isinstance(value[0], dict) and len(value) <= PART:
        return "[" + ", ".join([await to_json(one) for one in value]) + "]"
    parts = []
    for start in range(0, len(value), PART):
        parts.append(json.dumps(value[start : start + PART])[1:-1])
        await asyncio.sleep(0)
    return "[" + ", ".join(parts) + "]"


async def in_thread(size: int, work: Callable[[Any], Any], given: Any) -> Any:
    """Do work on a text or token ids of this size in another thread; large ones take turns, so that small ones pass."""
    executor = _LARGE if size > LARGE_SIZE else None
    return await asyncio.get_running_loop().run_in_executor(executor, work, given)


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # In ASCII: an error may quote half of a surrogate pair.
    return Response(json.dumps(body), status, headers, media_type=JSON)


def _choice_body(piece: Piece, *, reports: bool) -> dict[str, Any]:
    """Return a choice, or a piece of one, in the shape of OpenAI's API; one that failed has an `error`, too."""
    logprobs = report_logprobs(piece.tokens) if reports else None
    body = {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
    return body if piece.error is None else {**body, **_shown_error(piece.error).body()}


def _event(body: str) -> bytes:
    return f"data: {body}\n\n".encode()


async def _read_prompt(entry: str | list[int], model: ServedModel, *, slides: bool) -> Prompt:
    """Return a prompt in tokens: a text begins a document, token ids are taken as they are. Raises `UserError`.

    If it slides, a text that is longer than any that fits is encoded from near its end on: only half of the context is
    read then, far from where it is cut.
    """
    if not isinstance(entry, str):
        return cast(Prompt, await in_thread(len(entry), partial(ids_prompt, model.generator), entry))
    most = model.generator.engine.context_length * model.longest_token_characters
    end = entry[-most:] if slides else entry
    prompt = cast(Prompt, await in_thread(len(end), partial(text_prompt, model.generator), end))
    return replace(prompt, text=entry)


def _check_length(entry: str | list[int], model: ServedModel, *, can_slide: bool) -> None:
    """Raise `UserError` if a prompt cannot fit, before it is encoded, which takes seconds for megabytes of text."""
    least, length = len(entry), model.generator.engine.context_length
    if isinstance(entry, str):
        least = -(-least // model.longest_token_characters)
    if least > length:
        count = f"at least {least}" if isinstance(entry, str) else least
        advice = "shorten it, or set context_overflow to slide" if can_slide else "shorten it"
        raise UserError(f"prompt: {count} tokens do not fit in the context of {length}; {advice}")


def _submit(worker: Worker, job: Job) -> None:
    """Submit a job. Raises `ApiError` if the queue is full or the engine has ended."""
    try:
        worker.submit(job)
    except QueueFullError as error:
        headers = {"Retry-After": str(error.retry_after_seconds)}
        raise ApiError(429, str(error), code="queue_full", outcome="rejected", headers=headers) from error
    except RuntimeError as error:
        raise ApiError(503, str(error), outcome="failed") from error


def _engine_error(error: Exception) -> ApiError:
    """Return what a client reads of an error of the engine, and log one that is not the client's."""
    if not isinstance(error, UserError):
        logger.error("a request failed: %s", error, exc_info=error)
    return _shown_error(error)


def _shown_error(error: Exception) -> ApiError:
    """Return what a client reads of an error of the engine."""
    if isinstance(error, UserError):
        return to_api_error(error)
    return ApiError(500, "the engine failed; the server's log says why", outcome="failed")


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
