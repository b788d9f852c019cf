"""The HTTP application: routes, API keys, error bodies, gauges and the playground page."""

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import UserError
from pipeline.serving.completions import (
    EventStream,
    answer_whole,
    begin_call,
    check_name,
    error_response,
    in_thread,
    json_answer,
    json_response,
)
from pipeline.serving.metrics import Metrics
from pipeline.serving.openai import (
    UNKNOWN_FIELD,
    ApiError,
    CompletionRequest,
    DetokenizeRequest,
    FeedbackRequest,
    TokenizeRequest,
    to_api_error,
    unreadable_body,
    validation_to_api_error,
)
from pipeline.serving.options import KEYS_VARIABLE, Access, Limits
from pipeline.serving.served import Served, ServedModel
from pipeline.serving.shapes import shorten

if TYPE_CHECKING:
    from pipeline.serving.traces import Traces

COMPLETIONS = "/v1/completions"
FEEDBACK = "/v1/feedback"
BODY = "pipeline.body"
"""The key of a request's scope that holds its body once that is read."""
BEGUN = "pipeline.begun"
"""The key of a request's scope that says that its call has begun, and so is counted where it ends."""
LARGE_BODY_BYTES = 100_000
PAUSE_S = 0.005
"""Long enough for the event loop to take up what has come meanwhile."""
LONGEST_LENGTH = 18
"""The most digits of a Content-Length; Python refuses to read thousands."""
PLAYGROUND = Path(__file__).with_name("playground.html")

logger = logging.getLogger(__name__)


def create_app(
    served: Served,
    metrics: Metrics,
    limits: Limits,
    access: Access,
    *,
    root_path: str = "",
    checks_host: bool = False,
    traces: "Traces | None" = None,
) -> FastAPI:
    """Create the application. It loads the model on startup and ends the engine on shutdown.

    `root_path` is the path under which a proxy shows it, whether the proxy removes that from requests or not. With
    `checks_host` it answers only to the names that `access` allows.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Loading takes seconds; no request is accepted before it is done.
        if not served.started:
            await asyncio.to_thread(served.start)
        yield
        await asyncio.to_thread(served.close)

    app = FastAPIOffline(
        title="GPT-2 pipeline", description="OpenAI's completions over ONNX Runtime.", version="1", lifespan=lifespan
    )
    app.add_middleware(Failures, metrics=metrics)
    app.add_middleware(BodyLimit, limits=limits)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            max_age=600,
        )
    app.add_middleware(Entrance, root_path=root_path)
    if checks_host:
        app.add_middleware(HostCheck, access=access)
    app.router.route_class = JsonRoute
    _add_error_handlers(app, metrics)
    _add_gauges(served, metrics)
    with_key = [Depends(_key_check(access.keys))]
    takes_thumbs = traces is not None and traces.takes_thumbs

    @app.post(COMPLETIONS, dependencies=with_key, tags=["completions"], response_model=None)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """Continue each prompt; with `stream`, answer as server-sent events."""
        client, arrived = client_of(request), time.perf_counter()
        span = None if traces is None else traces.begin(asked, served.current.name, request.headers)
        call = await begin_call(asked, served, metrics, limits, client=client, arrived=arrived, span=span)
        request.scope[BEGUN] = True
        return EventStream(call) if asked.stream else await answer_whole(call, request)

    @app.get("/v1/models", dependencies=with_key, tags=["models"])
    async def models() -> dict[str, Any]:
        """List the model that takes new requests, and earlier versions that still finish theirs."""
        listed = {"object": "list", "data": [model.card() for model in served.models]}
        return {**listed, "feedback": True} if takes_thumbs else listed

    @app.get("/v1/models/{name:path}", dependencies=with_key, tags=["models"])
    async def model(name: str) -> dict[str, Any]:
        """Describe one model."""
        with served.lease() as current:
            check_name(name, current)
            return current.card()

    if traces is not None and takes_thumbs:

        @app.post(FEEDBACK, dependencies=with_key, tags=["completions"])
        async def feedback(asked: FeedbackRequest) -> dict[str, Any]:
            """Say whether a continuation is good; null takes that back. It becomes feedback on its trace in MLflow."""
            await traces.set_thumb(asked.id, asked.index, asked.value)
            return {"object": "feedback", "id": asked.id, "index": asked.index, "value": asked.value}

    @app.post("/tokenize", dependencies=with_key, tags=["tokens"])
    async def tokenize(asked: TokenizeRequest) -> Response:
        """Return the token ids of a text, without the end-of-text that a prompt begins with."""
        with served.lease() as current:
            check_name(asked.model, current)
            encode = current.generator.tokenizer.encode_batch_fast
            (encoding,) = await in_thread(len(asked.prompt), encode, [asked.prompt])
            ids = encoding.ids
            length = current.generator.engine.context_length
            return await json_answer({"tokens": ids, "count": len(ids), "max_model_len": length})

    @app.post("/detokenize", dependencies=with_key, tags=["tokens"])
    async def detokenize(asked: DetokenizeRequest) -> Response:
        """Return the text of token ids."""
        with served.lease() as current:
            check_name(asked.model, current)
            try:
                current.generator.engine.check_ids("tokens", asked.tokens)
            except UserError as error:
                raise to_api_error(error) from error
            decode = current.generator.tokenizer.decode_batch
            (text,) = await in_thread(len(asked.tokens), partial(decode, skip_special_tokens=False), [asked.tokens])
            return json_response({"prompt": text})

    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """Report that the process is alive."""
        return {"status": "alive"}

    @app.get("/ready", tags=["operation"])
    async def ready() -> dict[str, str]:
        """Report whether requests are taken: the model has drawn its first tokens, and the server is not stopping."""
        if not served.ready:
            raise ApiError(503, "not ready")
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"], dependencies=[] if access.open_metrics else with_key)
    async def prometheus() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    page, policy = playground()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    return app


class Entrance:
    """Middleware that gives every path the prefix `root_path`, and answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            root, path = self._root_path, scope["path"]
            if root and path != root and not path.startswith(f"{root}/"):
                path = root + path
            # Uvicorn keeps its own scope, and leaves out the body of an answer to HEAD.
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "root_path": root, "path": path, "method": method}
        await self._app(scope, receive, send)


class HostCheck:
    """Middleware that refuses requests for another host, see `Access.allows_host`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] != "http" or not host or self._access.allows_host(host):
            await self._app(scope, receive, send)
            return
        text = f"Host: {shorten(repr(host))} is not a name of this server; allow it with --allowed-host, or set keys"
        await error_response(ApiError(403, text))(scope, receive, send)


class JsonRequest(Request):
    """A request whose JSON is read by Pydantic's parser, which holds others up for half as long as Python's."""

    async def body(self) -> bytes:
        # The handlers of errors are given another object for this request.
        body = self.scope[BODY] = await super().body()
        return body

    async def json(self) -> Any:
        body = await self.body()
        try:
            values = from_json(body)
        except ValueError:
            # Python's reads more: half of a surrogate pair, say, which is then refused in its field.
            values = await super().json()
        if len(body) > LARGE_BODY_BYTES:
            # Others are answered before it is checked, which takes as long as to read it.
            await asyncio.sleep(PAUSE_S)
        return values


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


class Failures:
    """Middleware that answers an unforeseen exception with a 500, counts and logs it.

    It is inside of the others, which so add to it what they add to any answer, such as the headers of CORS.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def send_noting(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception:
            if _is_completions(scope) and BEGUN not in scope:
                self._metrics.requests.labels("failed").inc()
            if has_started or scope["type"] != "http":
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await error_response(ApiError(500, "internal error; the server's log has it"))(scope, receive, send)


class BodyLimit:
    """Middleware that refuses a body that is too large, unread if the headers give its length, or that is too slow."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._most_bytes = limits.body_bytes
        self._timeout_s = limits.timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        text = f"the body is larger than {self._most_bytes:,} bytes"
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and (len(length) > LONGEST_LENGTH or int(length) > self._most_bytes):
            await error_response(ApiError(413, text))(scope, receive, send)
            return
        read, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def receive_within_limit() -> Message:
            nonlocal read, is_whole
            if is_whole:
                # What comes now is the end of the connection.
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = f"the body did not arrive within {self._timeout_s:g} s"
                headers = {"Connection": "close"}
                raise ApiError(408, late, code="timeout", outcome="timed_out", headers=headers) from None
            is_whole = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self._most_bytes:
                raise ApiError(413, text)
            return message

        await self._app(scope, receive_within_limit, send)


def playground() -> tuple[str, str]:
    """Return the page, and the security policy that allows its own script and style and nothing else."""
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


def client_of(request: Request) -> str:
    """Return whose request it is, for the limit of each client: its key, if it had to send one, or its address."""
    host = "" if request.client is None else request.client.host
    return str(getattr(request.state, "key", host))


def _key_check(keys: tuple[str, ...]) -> Callable[..., Awaitable[None]]:
    """Return the dependency that refuses requests without one of the keys."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    scheme = HTTPBearer(auto_error=False, description=f"One of {KEYS_VARIABLE}, if the server has any")

    async def check(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if not digests:
            return
        given_digest = hashlib.sha256(b"" if given is None else given.credentials.encode()).digest()
        # Every key is compared, so that the time reveals nothing.
        matches = [hmac.compare_digest(given_digest, digest) for digest in digests]
        if not any(matches):
            raise ApiError(
                401,
                "Authorization: expected Bearer and a key of this server",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        request.state.key = given_digest.hex()

    return check


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error in OpenAI's shape, without paths of this machine."""

    def respond(request: Request, error: ApiError) -> Response:
        # A call that has begun is counted where it ends.
        if _is_completions(request.scope):
            metrics.requests.labels(error.outcome).inc()
        return error_response(error)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid" or (first["loc"] == ("body",) and first["type"] != UNKNOWN_FIELD):
            return respond(request, unreadable_body(request.scope.get(BODY, b""), request.headers))
        return respond(request, validation_to_api_error(first))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):
            # FastAPI replaces what is raised while it reads a body.
            return respond(request, error.__cause__)
        if error.status_code == 400:
            # FastAPI's answer to a body that raises anything but a JSON error.
            return respond(request, unreadable_body(request.scope.get(BODY, b""), request.headers))
        texts = {404: "no such path; /docs lists them", 405: "this path takes another method"}
        text = texts.get(error.status_code, str(error.detail))
        return respond(request, ApiError(error.status_code, text, headers=dict(error.headers or {})))


def _is_completions(scope: Scope) -> bool:
    return getattr(scope.get("route"), "path", None) == COMPLETIONS


def _add_gauges(served: Served, metrics: Metrics) -> None:
    def total(read: Callable[[ServedModel], int]) -> Callable[[], float]:
        return lambda: float(sum(read(model) for model in served.models))

    metrics.gauge("pipeline_queue_length", "Continuations that wait", total(lambda model: model.worker.waiting))
    metrics.gauge(
        "pipeline_running_requests", "Continuations in the running batch", total(lambda model: model.worker.running)
    )
    metrics.gauge("pipeline_cache_slots", "Slots of the cache", total(lambda model: model.worker.slots))
    metrics.gauge("pipeline_cache_slots_used", "Slots that are taken", total(lambda model: model.worker.running))

    metrics.gauge(
        "pipeline_refused_versions", "How often a new version could not be served", lambda: float(served.refusals)
    )

    def info() -> dict[str, str]:
        card = served.current.card()
        names = {"name": "id", "version": "version", "precision": "precision", "provider": "provider"}
        return {label: str(card[field] or "") for label, field in names.items()}

    metrics.model_info(info)
