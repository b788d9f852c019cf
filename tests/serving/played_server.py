"""A fake server for tests of the page: the page with its policy, and answers that the test sets."""

import asyncio
import hashlib
import json
import re
import socket
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from pipeline.decoding import ModelDecoding, SamplingParams
from pipeline.errors import UserError

PAGE = Path(__file__).parents[2] / "pipeline" / "serving" / "playground.html"
OWN_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
NOT_DECODING = {"model", "prompt", "preset", "stream", "stream_options", "echo", "user"}
LONGEST_PROMPT = 2000


@dataclass(frozen=True)
class Piece:
    """The content of one event: a text, and its tokens, each with its log-probability and those of the likeliest."""

    text: str
    tokens: list[tuple[str, float, dict[str, float]]]


def piece(text: str, logprob: float = -0.5, **top: float) -> Piece:
    """Return a piece of one token; `top` are other likely tokens."""
    return Piece(text, [(text, logprob, {text: logprob, **{f" {name}": other for name, other in top.items()}})])


PIECES = [
    piece(" keeper", -0.105, baker=-2.5, boat=-4.6),
    piece(" lit", -0.69, saw=-1.2),
    piece(" the", -0.01),
    piece(" lamp", -5.3, fire=-0.2, stove=-2.3),
    piece("\n\n", -1.6),
    # Two tokens are the bytes of one character; its text comes with the second.
    Piece("", [(" �", -2.0, {" �": -2.0})]),
    Piece(" 🙂", [("�", -0.3, {"�": -0.3})]),
    piece(".", -0.2),
]
TEXT = "".join(each.text for each in PIECES)


@dataclass
class Played:
    """The answers of the server, which a test sets before it acts."""

    pieces: Callable[[dict[str, Any]], list[Piece]] = lambda body: PIECES
    version: str = "3"
    decoding: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.8, "top_k": 50, "max_new_tokens": 400})
    presets: dict[str, Any] = field(
        default_factory=lambda: {
            "balanced": {"temperature": 0.9, "min_p": 0.05, "max_new_tokens": 400},
            "faithful": {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 300, "repetition_detection": [20, 3]},
            "adventurous": {"temperature": 1.2, "typical_p": 0.9, "stop": ["\n\n"]},
        }
    )
    lineage: dict[str, Any] = field(
        default_factory=lambda: {
            "run_id": "0123456789abcdef0123456789abcdef",
            "run_url": "http://tracking.example/#/experiments/1/runs/0123456789abcdef0123456789abcdef",
            "git_commit": "43ea123f00d43ea123f00d43ea123f00d43ea123",
            "git_dirty": "true",
            "data_md5": "9a0364b9e99bb480dd25e1f0284c8555.dir",
            "base": "openai-community/gpt2-medium",
            "registered": "2026-11-24T09:30:00+00:00",
        }
    )
    keys: frozenset[str] = frozenset()
    takes_feedback: bool = False
    feedback: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of the requests with feedback, in order."""
    forgets: bool = False
    """Whether feedback is refused because there is no trace."""
    queue_full: bool = False
    breaks: str | None = None
    """The message of an error that ends the stream."""
    endless: bool = False
    pause_s: float = 0.0
    first_piece_only: bool = False
    """Whether to send only the first piece until `go_on` is set."""
    go_on: Event = field(default_factory=Event)
    disconnected: Event = field(default_factory=Event)
    """Set when a client disconnects during a stream."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of the requests for completions, in order."""
    raw_bodies: list[str] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)


class PlayedServer:
    """Serves on a free port of this machine inside a `with` block; `played` has its next answers."""

    def __init__(self) -> None:
        self.played = Played()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(_app(self), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def policy(page: str) -> str:
    """Return the Content-Security-Policy that allows the page's own style and script, and nothing else."""
    hashes = {
        tag: b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for tag in ("style", "script")
        for content in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    }
    return (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _app(server: PlayedServer) -> FastAPI:
    app = FastAPI()

    @app.get("/")
    def page() -> Response:
        content = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(content, headers={"Content-Security-Policy": policy(content)})

    @app.get("/v1/models")
    def models(request: Request) -> Response:
        listed = {"object": "list", "data": [_model(server.played)]}
        answer = {**listed, "feedback": True} if server.played.takes_feedback else listed
        return _refuse(server.played, request) or JSONResponse(answer)

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> Response:
        if server.played.forgets:
            return _error(404, "id: no trace of such a completion", param="id")
        server.played.feedback.append(await request.json())
        return _refuse(server.played, request) or JSONResponse(server.played.feedback[-1])

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        words = (await request.json())["prompt"].split()
        answer = {"tokens": list(range(len(words))), "count": len(words), "max_model_len": 512}
        return _refuse(server.played, request) or JSONResponse(answer)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        played = server.played
        played.raw_bodies.append((await request.body()).decode())
        body = json.loads(played.raw_bodies[-1])
        played.bodies.append(body)
        played.authorizations.append(request.headers.get("Authorization"))
        if refused := _refuse(played, request):
            return refused
        if played.queue_full:
            return _error(429, "the queue is full", headers={"Retry-After": "2"})
        if len(body["prompt"]) > LONGEST_PROMPT:
            return _error(400, "prompt: longer than the context", param="prompt")
        decoding = {OWN_NAMES.get(name, name): value for name, value in body.items() if name not in NOT_DECODING}
        try:
            ModelDecoding(SamplingParams(), played.presets).preset(body.get("preset"))
            SamplingParams.from_mapping(decoding)
        except UserError as error:
            return _error(400, str(error), param=str(error).split(":")[0])
        return StreamingResponse(_events(played, body), media_type="text/event-stream")

    return app


def _model(played: Played) -> dict[str, Any]:
    return {
        "id": "harbour-tales",
        "object": "model",
        "created": 1764000000,
        "owned_by": "pipeline",
        "version": played.version,
        "precision": "int8",
        "provider": "cpu",
        "context_length": 512,
        "vocabulary_size": 8192,
        "decoding": played.decoding,
        "presets": played.presets,
        "lineage": played.lineage,
    }


def _refuse(played: Played, request: Request) -> Response | None:
    if not played.keys or request.headers.get("Authorization", "").removeprefix("Bearer ") in played.keys:
        return None
    return _error(401, "a key is needed", kind="authentication_error")


def _error(
    status: int,
    message: str,
    *,
    param: str | None = None,
    kind: str = "invalid_request_error",
    headers: dict[str, str] | None = None,
) -> Response:
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": None}}, status, headers=headers
    )


async def _events(played: Played, body: dict[str, Any]) -> AsyncIterator[str]:
    pieces = played.pieces(body)
    chunk = {
        "id": f"cmpl-{len(played.bodies)}",
        "object": "text_completion",
        "created": 1764000000,
        "model": "harbour-tales",
        "system_fingerprint": f"harbour-tales/{played.version}/int8",
    }
    finished = False
    try:
        for index, each in enumerate(pieces * 1000 if played.endless else pieces):
            yield _event({**chunk, "choices": [_choice(each)]})
            await asyncio.sleep(0.01 if played.endless else played.pause_s)
            while index == 0 and played.first_piece_only and not played.go_on.is_set():
                await asyncio.sleep(0.01)
        if played.breaks:
            yield _event({"error": {"message": played.breaks, "type": "server_error", "param": None, "code": None}})
        else:
            yield _event({**chunk, "choices": [_choice(Piece("", []), "stop")]})
            count = sum(len(each.tokens) for each in pieces)
            usage = {"prompt_tokens": 2, "completion_tokens": count, "total_tokens": count + 2}
            yield _event({**chunk, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finished = True
    finally:
        if not finished:
            played.disconnected.set()


def _choice(given: Piece, finish_reason: str | None = None) -> dict[str, Any]:
    logprobs = {
        "tokens": [token for token, _, _ in given.tokens],
        "token_logprobs": [logprob for _, logprob, _ in given.tokens],
        "top_logprobs": [top for _, _, top in given.tokens],
        "text_offset": [0 for _ in given.tokens],
    }
    return {"index": 0, "text": given.text, "logprobs": logprobs, "finish_reason": finish_reason}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


if __name__ == "__main__":
    with PlayedServer() as running, suppress(KeyboardInterrupt):
        print(running.url)
        Event().wait()
