"""Requests that are meant to hold up a server, end it, or fill its memory: each must be answered or refused."""

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.serving.options import BODY_BYTES

PATIENCE_S = 120
JSON = {"Content-Type": "application/json"}
MOST_BYTES = BODY_BYTES - 10_000
SLOW_S = 2.0
RUBBISH = (
    b"",
    b"{",
    b"[]",
    b"\x00\xff",
    b'{"prompt": 5}',
    b'{"prompt": "a", "temprature": 1}',
    b'{"prompt": "a", "top_p": 7}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": [999999999]}',
    b'{"prompt": "a", "max_tokens": 1e99}',
    b'{"prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
    b'{"prompt": "a", "n": 1000000000}',
    b"[" * 10_000,
)


@dataclass(frozen=True)
class Target:
    """The server under test."""

    port: int
    context_length: int
    vocabulary_size: int


def attack_together(target: Target, clients: int, seconds: float) -> Counter[str]:
    """Let so many hostile clients do one thing after another; return how each was answered.

    What begins with `fault` was wrong.
    """
    outcomes: Counter[str] = Counter()
    ends = time.monotonic() + seconds

    def work(number: int) -> None:
        draw = random.Random(f"hostile {number}")
        while time.monotonic() < ends:
            act = draw.choice([_large, _large, _heavy, _heavy, _leave, _leave_at_once, _rubbish, _be_slow, _tokenize])
            try:
                outcome = act(target, draw)
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                outcome = f"fault: {act.__name__}: {error!r}"
            with lock:
                outcomes[outcome] += 1

    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def _filled(begin: str, element: str, end: str) -> bytes:
    """Return a body of as many elements as one may have."""
    count = (MOST_BYTES - len(begin) - len(end)) // (len(element) + 1)
    return (begin + ",".join([element] * count) + end).encode()


def _large(target: Target, draw: random.Random) -> str:
    """Send two megabytes that must be refused, whatever is in them."""
    fields: list[Callable[[], bytes]] = [
        *(
            lambda element=element: _filled('{"prompt":[', element, "]}")
            for element in ("{}", "null", "1.5", "[]", '["x"]', '""', "[1,-1]", '"a"', "0")
        ),
        lambda: _filled('{"prompt":"a","stop":[', "1", "]}"),
        lambda: _filled('{"prompt":"a","stop":[', '"zz"', "]}"),
        lambda: _filled('{"prompt":"a","stop_token_ids":[', '"x"', "]}"),
        lambda: _filled('{"prompt":"a","logit_bias":[', "{}", "]}"),
        lambda: json.dumps({"prompt": "a", **{f"field{index}": index for index in range(50_000)}}).encode(),
        lambda: json.dumps({"prompt": "The lamp. " * (MOST_BYTES // 10)}).encode(),
        lambda: json.dumps({"prompt": "a", "user": {"a": ["b"] * 300_000}, "max_tokens": 10**30, "n": 10**6}).encode(),
    ]
    status, body = post(target.port, draw.choice(fields)())
    return "refused" if status == 400 else f"fault: {status} {body[:200]!r} for a large body"


def _heavy(target: Target, draw: random.Random) -> str:
    """Ask for much that a request may ask for."""
    long = [draw.randrange(256) for _ in range(target.context_length - 2)]
    body: dict[str, Any] = draw.choice(
        [
            {"prompt": "a", "temperature": 1e39, "min_tokens": 20, "max_tokens": 30, "no_repeat_ngram_size": 2},
            {"prompt": "a", "top_k": 2**70, "seed": -(2**63), "top_n_sigma": 1e308, "max_tokens": 5},
            {"prompt": [long] * 4, "echo": True, "logprobs": 20, "max_tokens": 0},
            {"prompt": long, "n": 8, "max_tokens": 1},
            {"prompt": [long] * 8, "max_tokens": 1},
            {"prompt": "a", "stop": ["a" * 15 + str(index) for index in range(60)], "max_tokens": 50},
            {"prompt": "a", "stop": ["e" * 1024], "max_tokens": 50, "n": 4},
            {"prompt": "a", "stop_token_ids": list(range(1, 200)), "min_tokens": 20, "max_tokens": 40},
            {"prompt": "a", "logit_bias": {str(index): 1 for index in range(200)}, "n": 8, "max_tokens": 4},
            {"prompt": ["a"] * 16, "banned_token_ids": list(range(target.vocabulary_size - 50)), "max_tokens": 4},
            {"prompt": [long[:5]] * 2, "allowed_token_ids": long[:5], "no_repeat_ngram_size": 1, "min_tokens": 5},
            {"prompt": "x " * 900_000, "context_overflow": "slide", "max_tokens": 2},
            {"prompt": [1] * 600_000, "context_overflow": "slide", "max_tokens": 2, "echo": True},
        ]
    )
    status, answer = post(target.port, {**body, "stream": draw.random() < 0.5})
    return (
        f"heavy: {status}" if status in (200, 400, 429) else f"fault: {status} {answer[:200]!r} for {str(body)[:200]}"
    )


def _tokenize(target: Target, draw: random.Random) -> str:
    path, body = draw.choice(
        [
            ("/tokenize", json.dumps({"prompt": "x " * 900_000}).encode()),
            ("/detokenize", json.dumps({"tokens": [5] * 600_000}).encode()),
            ("/detokenize", _filled('{"tokens":[', "{}", "]}")),
        ]
    )
    status, answer = post(target.port, body, path)
    return "tokenized" if status in (200, 400) else f"fault: {status} {answer[:200]!r} of {path}"


def _leave(target: Target, draw: random.Random) -> str:
    """Read the beginning of a stream, and disconnect."""
    with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S) as connection:
        connection.sendall(_request({"prompt": "The lamp", "stream": True, "max_tokens": 500, "ignore_eos": True}))
        begin = connection.recv(draw.randrange(16, 4000))
    return "queue full" if b" 429 " in begin else "left" if b" 200 " in begin else f"fault: {begin!r}"


def _leave_at_once(target: Target, draw: random.Random) -> str:
    """Send a request or half of it, and disconnect."""
    request = _request({"prompt": "The lamp", "stream": draw.random() < 0.5, "max_tokens": 500, "ignore_eos": True})
    with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S) as connection:
        connection.sendall(request[: draw.choice([len(request), len(request) // 2])])
        if draw.random() < 0.5:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    return "left at once"


def _be_slow(target: Target, draw: random.Random) -> str:
    """Send half a request, or read nothing of an answer, for a while."""
    request = _request({"prompt": "The lamp", "stream": True, "max_tokens": 500, "n": 4, "ignore_eos": True})
    with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S) as connection:
        connection.sendall(request[: draw.choice([len(request), len(request) // 2])])
        time.sleep(SLOW_S)
    return "was slow"


def _rubbish(target: Target, draw: random.Random) -> str:
    if draw.random() < 0.2:
        with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S) as connection:
            connection.sendall(draw.randbytes(200) + b"\r\n\r\n")
            connection.recv(100)
        return "rubbish refused"
    status, body = post(target.port, draw.choice(RUBBISH))
    return "rubbish refused" if status == 400 else f"fault: {status} {body!r} for rubbish"


def hold_open(target: Target) -> list[socket.socket]:
    """Return connections that would keep a server from ending: one reads no answer, one never ends its request."""
    body = {"prompt": "a", "stream": True, "max_tokens": 10**8, "context_overflow": "slide", "ignore_eos": True}
    held = []
    for request in (_request(body), _request(body)[:-20]):
        connection = socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S)
        connection.sendall(request)
        held.append(connection)
    return held


def _request(body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    return f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + text


def post(port: int, body: dict[str, Any] | bytes, path: str = "/v1/completions") -> tuple[int, bytes]:
    """Send a body; return the status and the whole answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), JSON)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
