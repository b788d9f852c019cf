"""The HTTP server: OpenAI's completions over the engine, with limits, keys, metrics and the playground."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import UserError
from pipeline.serving.metrics import Metrics
from pipeline.serving.openai import (
    ApiError,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    invalid,
    refused,
)
from pipeline.serving.served import Served, ServedModel
from pipeline.serving.worker import Job, Piece, Prompt, QueueFullError, TokenText, text_prompt

COMPLETIONS = "/v1/completions"
KEYS_VARIABLE = "PIPELINE_API_KEYS"
BODY_BYTES = 2 * 2**20
"""Of a request at most: room for a hundred prompts of GPT-2's context in token ids."""
PLAYGROUND = Path(__file__).with_name("playground.html")
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Nothing between here and the client holds a stream back."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int | None = None
    """Drawn for a continuation; none for what the context holds."""
    timeout_s: float = 300.0
    """From its arrival to its end."""
    body_bytes: int = BODY_BYTES


def create_app(
    served: Served,
    metrics: Metrics,
    *,
    limits: Limits,
    keys: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    open_metrics: bool = False,
) -> FastAPI:
    """The application. It loads the model as it starts, and ends the engine as it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Loading takes seconds, and the port is open only then: nobody is answered before.
        if not served.started:
            await asyncio.to_thread(served.start)
        yield
        await asyncio.to_thread(served.close)

    app = FastAPIOffline(
        title="GPT-2 pipeline", description="OpenAI's completions over ONNX Runtime.", version="1", lifespan=lifespan
    )
    app.add_middleware(BodyLimit, most_bytes=limits.body_bytes)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], max_age=600
        )
    _add_errors(app, metrics)
    _watch_models(served, metrics)
    known = Depends(_keeper(keys))

    @app.post(COMPLETIONS, dependencies=[known], tags=["completions"], response_model=None)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """Continue each prompt; with `stream`, as server-sent events."""
        began = time.perf_counter()
        _check_open(served)
        with ExitStack() as stack:
            model = stack.enter_context(served.lease())
            _check_name(asked.model, model)
            call = await Call.begin(asked, model, metrics, limits, began)
            # From here on the call owns the lease.
            call.release = stack.pop_all().close
        if asked.stream:
            return EventStream(call)
        return await answer(call, request)

    @app.get("/v1/models", dependencies=[known], tags=["models"])
    async def models() -> dict[str, Any]:
        """The model that takes new requests, and versions that finish what they have."""
        return {"object": "list", "data": [model.card() for model in served.models]}

    @app.get("/v1/models/{name:path}", dependencies=[known], tags=["models"])
    async def model(name: str) -> dict[str, Any]:
        """The card of a model."""
        with served.lease() as current:
            _check_name(name, current)
            return current.card()

    @app.post("/tokenize", dependencies=[known], tags=["tokens"])
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a text, without the end-of-text that is put before a prompt."""
        with served.lease() as current:
            _check_name(asked.model, current)
            ids = (await asyncio.to_thread(current.generator.tokenizer.encode, asked.prompt)).ids
            return {"tokens": ids, "count": len(ids), "max_model_len": current.generator.engine.context_length}

    @app.post("/detokenize", dependencies=[known], tags=["tokens"])
    async def detokenize(asked: DetokenizeRequest) -> dict[str, str]:
        """The text of token ids."""
        with served.lease() as current:
            _check_name(asked.model, current)
            _check_ids("tokens", asked.tokens, current)
            decode = current.generator.tokenizer.decode
            return {"prompt": await asyncio.to_thread(decode, asked.tokens, skip_special_tokens=False)}

    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "alive"}

    @app.get("/ready", tags=["operation"])
    async def ready() -> dict[str, str]:
        """Whether it takes requests: the model has drawn its first tokens, and the server was not told to end."""
        if not served.ready:
            raise ApiError(503, "not ready")
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"], dependencies=[] if open_metrics else [known])
    async def prometheus() -> Response:
        """Measures in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    page, policy = playground()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    return app


class Call:
    """A request for completions from its first check to the end of its job."""

    def __init__(
        self, asked: CompletionRequest, model: ServedModel, metrics: Metrics, job: Job, timeout_s: float
    ) -> None:
        self.asked = asked
        self.model = model
        self.job = job
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.completion_tokens = 0
        self.release: Callable[[], None] = lambda: None
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._pieces: asyncio.Queue[list[Piece] | Exception] = asyncio.Queue()
        self._open = job.choices

    @classmethod
    async def begin(
        cls, asked: CompletionRequest, model: ServedModel, metrics: Metrics, limits: Limits, began: float
    ) -> "Call":
        """Check a request and hand it to the engine. Raises `ApiError`."""
        params = asked.sampling(model.files.decoding, limits.max_tokens)
        draws = asked.max_tokens != 0
        try:
            # Before work is done for prompts that nobody will continue.
            model.worker.check(len(asked.prompts()) * params.n)
            prompts = [await _prompt(entry, model) for entry in asked.prompts()]
            for prompt in prompts:
                if draws:
                    model.generator.check(prompt.ids, params)
                if asked.echo and asked.logprobs is not None:
                    model.generator.engine.check_text(prompt.ids, "prompt")
        except UserError as error:
            raise refused(error) from error
        loop = asyncio.get_running_loop()
        job = Job(prompts, params, lambda _: None, echo=bool(asked.echo), draws=draws, began=began)
        call = cls(asked, model, metrics, job, limits.timeout_s)
        job.deliver = lambda pieces: _deliver(loop, call._pieces, pieces)
        try:
            model.worker.submit(job)
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after_seconds)}
            raise ApiError(429, str(error), code="queue_full", outcome="rejected", headers=headers) from error
        except RuntimeError as error:
            raise ApiError(503, str(error), outcome="failed") from error
        metrics.prompt_tokens.inc(call.prompt_tokens)
        return call

    @property
    def prompt_tokens(self) -> int:
        """What the model reads of the prompts, with the end-of-text before a text."""
        return sum(len(prompt.ids) for prompt in self.job.prompts)

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What each step gives, to the end of the last choice. Raises `ApiError`."""
        ends_at = self.job.began - time.perf_counter() + self._timeout_s
        try:
            async with asyncio.timeout(ends_at):
                while self._open:
                    got = await self._pieces.get()
                    if isinstance(got, Exception):
                        raise _failure(got)
                    for piece in got:
                        self.completion_tokens += piece.token_count
                        self._open -= piece.finish_reason is not None
                    yield got
        except TimeoutError:
            text = f"the request took longer than {self._timeout_s:g} s"
            raise ApiError(504, text, code="timeout", outcome="timed_out") from None

    def close(self, outcome: str) -> None:
        """Free what the call holds, and count how it ended. Called once, whatever happens."""
        if self._open:
            self.model.worker.cancel(self.job)
        self._metrics.requests.labels(outcome).inc()
        self.release()

    def body(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        body = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
            "choices": choices,
        }
        return body if usage is None else {**body, "usage": usage}


async def answer(call: Call, request: Request) -> Response:
    """The whole of a call at once; a client that goes away ends it."""
    outcome = "cancelled"
    reading = asyncio.ensure_future(_all_of(call))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            # Nobody reads it.
            return Response(status_code=499)
        body = reading.result()
        outcome = "completed"
        return _json(body)
    except ApiError as error:
        outcome = error.outcome
        return _error(error)
    finally:
        for task in (reading, leaving):
            task.cancel()
        call.close(outcome)


async def _all_of(call: Call) -> dict[str, Any]:
    gained: list[list[Piece]] = [[] for _ in range(call.job.choices)]
    async for pieces in call.pieces():
        for piece in pieces:
            gained[piece.index].append(piece)
    choices = [
        choice_body(
            index,
            "".join(piece.text for piece in own),
            [token for piece in own for token in piece.tokens],
            own[-1].finish_reason,
            reports=call.asked.logprobs is not None,
        )
        for index, own in enumerate(gained)
    ]
    return call.body(choices, call.usage)


class EventStream(StreamingResponse):
    """A call as server-sent events: a piece of a choice each, the last with the usage, then `[DONE]`."""

    def __init__(self, call: Call) -> None:
        super().__init__(self._events(call), media_type="text/event-stream", headers=STREAM_HEADERS)
        self._call = call
        self._outcome = "cancelled"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # A client that goes away cancels it, even before the first event.
            await super().__call__(scope, receive, send)
        finally:
            self._call.close(self._outcome)

    async def _events(self, call: Call) -> AsyncIterator[bytes]:
        reports = call.asked.logprobs is not None
        left = call.job.choices
        try:
            async for pieces in call.pieces():
                events = []
                for piece in pieces:
                    left -= piece.finish_reason is not None
                    if piece.text or piece.tokens or piece.finish_reason is not None:
                        choice = choice_body(
                            piece.index, piece.text, piece.tokens, piece.finish_reason, reports=reports
                        )
                        events.append(_event(call.body([choice], call.usage if left == 0 else None)))
                if events:
                    yield b"".join(events)
        except ApiError as error:
            self._outcome = error.outcome
            yield _event(error.body())
            return
        if call.asked.stream_options is not None and call.asked.stream_options.include_usage:
            yield _event(call.body([], call.usage))
        yield b"data: [DONE]\n\n"
        self._outcome = "completed"


def choice_body(
    index: int, text: str, tokens: list[TokenText], finish_reason: str | None, *, reports: bool
) -> dict[str, Any]:
    """A choice, or a piece of it, as OpenAI's API spells it."""
    logprobs = None
    if reports:
        logprobs = {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [token.top_logprobs for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class BodyLimit:
    """Refuses a body that is larger than `most_bytes`, before it is read where its length is told."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self._most_bytes:
            await _error(ApiError(413, _too_large(self._most_bytes)))(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most_bytes:
                raise HTTPException(413, _too_large(self._most_bytes))
            return message

        await self._app(scope, counted, send)


def playground() -> tuple[str, str]:
    """The page, and the policy that lets it run nothing but its own script and style."""
    page = PLAYGROUND.read_text(encoding="utf-8")

    def digests(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
        return " ".join(f"'sha256-{value}'" for value in hashes)

    policy = (
        f"default-src 'none'; style-src {digests('style')}; script-src {digests('script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def keys_from_environment() -> tuple[str, ...]:
    """The keys of which a client must have one, or none. Raises `UserError` for one that no header carries."""
    keys = tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    if any(not key.isascii() or not key.isprintable() for key in keys):
        raise UserError(f"{KEYS_VARIABLE}: a key holds characters that no header carries; use letters and digits")
    return keys


def _keeper(keys: tuple[str, ...]) -> Callable[..., Awaitable[None]]:
    """What lets only those in who have a key."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    scheme = HTTPBearer(auto_error=False, description=f"One of {KEYS_VARIABLE}, where the server has any")

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if not digests:
            return
        digest = hashlib.sha256(b"" if given is None else given.credentials.encode()).digest()
        # All of them are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in digests]
        if not any(matches):
            raise ApiError(
                401,
                "Authorization: expected Bearer and a key of this server",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error in OpenAI's shape, without a path of this machine."""

    def told(request: Request, error: ApiError) -> Response:
        # A call that has begun is counted where it ends.
        if request.url.path == COMPLETIONS:
            metrics.requests.labels(error.outcome).inc()
        return _error(error)

    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> Response:
        return told(request, error)

    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> Response:
        return told(request, invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        texts = {404: "no such address; /docs lists those that are", 405: "this address takes another method"}
        text = texts.get(error.status_code, str(error.detail))
        return _error(ApiError(error.status_code, text, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def of_us(_: Request, error: Exception) -> Response:
        # Starlette raises it again, and so it is logged.
        return _error(ApiError(500, "internal error; the server's log has it"))


def _watch_models(served: Served, metrics: Metrics) -> None:
    def total(read: Callable[[ServedModel], int]) -> Callable[[], float]:
        return lambda: float(sum(read(model) for model in served.models))

    metrics.gauge("pipeline_queue_length", "Continuations that wait", total(lambda model: model.worker.waiting))
    metrics.gauge(
        "pipeline_running_requests", "Continuations in the running batch", total(lambda model: model.worker.running)
    )
    metrics.gauge("pipeline_cache_slots", "Slots of the cache", total(lambda model: model.worker.slots))
    metrics.gauge("pipeline_cache_slots_used", "Slots that are taken", total(lambda model: model.worker.running))

    def info() -> dict[str, str]:
        card = served.current.card()
        names = {"name": "id", "version": "version", "precision": "precision", "provider": "provider"}
        return {label: str(card[field] or "") for label, field in names.items()}

    metrics.model_info(info)


async def _prompt(entry: str | list[int], model: ServedModel) -> Prompt:
    """A prompt in tokens: a text is the beginning of a document, ids are what they are. Raises `ApiError`."""
    if isinstance(entry, str):
        return await asyncio.to_thread(text_prompt, model.generator, entry)
    _check_ids("prompt", entry, model)
    text = model.generator.tokenizer.decode(entry, skip_special_tokens=False)
    return Prompt(entry, text, has_context=False)


def _check_ids(name: str, ids: list[int], model: ServedModel) -> None:
    vocabulary_size = model.generator.engine.manifest.vocabulary_size
    for token_id in ids:
        if token_id >= vocabulary_size:
            raise ApiError(400, f"{name}: token id {token_id} is not in [0, {vocabulary_size})", param=name)


def _check_open(served: Served) -> None:
    if not served.ready:
        raise ApiError(503, "the server is about to end", outcome="rejected", headers={"Retry-After": "5"})


def _check_name(name: str | None, model: ServedModel) -> None:
    versioned = f"{model.name}/{model.version}"
    if name not in (None, model.name, versioned):
        raise ApiError(
            404, f"model: {name!r} is not served here, {model.name} is", param="model", code="model_not_found"
        )


def _failure(error: Exception) -> ApiError:
    """What the engine could not do, told to the client."""
    if isinstance(error, UserError):
        return refused(error)
    logger.error("a request failed: %s", error)
    return ApiError(500, "the engine failed; the server's log has it", outcome="failed")


def _deliver(
    loop: asyncio.AbstractEventLoop,
    pieces: "asyncio.Queue[list[Piece] | Exception]",
    got: list[Piece] | Exception,
) -> None:
    loop.call_soon_threadsafe(pieces.put_nowait, got)


async def _left(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(most_bytes: int) -> str:
    return f"the body is larger than {most_bytes:,} bytes"


def _error(error: ApiError) -> Response:
    return _json(error.body(), error.status, error.headers)


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # In ASCII: an error may quote half of a surrogate pair.
    return Response(json.dumps(body), status, headers, media_type="application/json")


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()
