"""Load a server with clients that stream, disconnect and send rubbish, and check that it recovers.

Starts a server on an engine folder, or on an engine with random weights. Every answer must be the right one, memory
must not grow, and every slot must be free at the end.
"""

import argparse
import contextlib
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from conversion import ROOT, export_engine
from decode import find_checkpoint

from pipeline.errors import UserError, report_errors

SETTLED_SHARE = 0.3
"""The share of the time after which memory should not grow."""
GROWTH_MIB = 48
"""The growth that is allowed, because allocators fragment memory."""
PATIENCE_S = 120
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
    b"[" * 10_000,
)


@dataclass(frozen=True)
class Target:
    """The server under test."""

    port: int
    longest_prompt: int
    """The length, in tokens, of the longest prompt to send."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="an engine folder (default: one of tiny random weights)")
    parser.add_argument("--precision", default="auto", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=600, help="default: %(default)g")
    parser.add_argument("--clients", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("out") / "benchmarks", help="default: %(default)s")
    arguments = parser.parse_args()
    with report_errors():
        engine = arguments.engine or tiny_engine(arguments.work)
        print(soak(engine, arguments.precision, seconds=arguments.seconds, clients=arguments.clients))


def tiny_engine(work: Path) -> Path:
    folder = work / "soak"
    if not folder.exists():
        export_engine(find_checkpoint("tiny", work), folder, ["float32"])
    return folder


def soak(engine: Path, precision: str, *, seconds: float, clients: int) -> str:
    """Run the clients, and return a report. Raises `UserError` if an answer was wrong or the server did not recover."""
    command = ["-m", "pipeline", "serve", "--model", str(engine.resolve()), "--precision", precision]
    process = subprocess.Popen(
        [sys.executable, *command, "--provider", "cpu", "--port", "0", "--max-queue", str(clients)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        found = re.search(r"127\.0\.0\.1:(\d+)/", process.stdout.readline() if process.stdout else "")
        if found is None:
            raise UserError("the server does not start")
        return _soak(int(found[1]), psutil.Process(process.pid), seconds, clients)
    finally:
        process.terminate()
        process.wait()


def _soak(port: int, process: psutil.Process, seconds: float, clients: int) -> str:
    (card,) = json.loads(_get(port, "/v1/models"))["data"]
    target = Target(port, card["context_length"] // 3)
    ends = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    faults: list[str] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        draw = random.Random(number)
        acts: list[Callable[[Target, random.Random], str]] = [_complete, _stream, _leave, _leave_at_once, _rubbish]
        while time.monotonic() < ends:
            act = draw.choice(acts)
            try:
                outcome = act(target, draw)
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                outcome = f"fault: {act.__name__}: {error!r}"
            with lock:
                counts[outcome] += 1
                if outcome.startswith("fault"):
                    faults.append(outcome)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    began = time.monotonic()
    while time.monotonic() < ends:
        time.sleep(min(1.0, seconds / 20))
        memory.append((time.monotonic() - began, process.memory_info().rss / 2**20))
    for thread in threads:
        thread.join()
    settled = next(mib for at, mib in memory if at >= SETTLED_SHARE * seconds)
    growth = memory[-1][1] - settled
    deadline = time.monotonic() + PATIENCE_S
    while (busy := {name: value for name, value in _gauges(port).items() if value}) and time.monotonic() < deadline:
        time.sleep(0.1)
    lines = [f"{count:7} {outcome}" for outcome, count in sorted(counts.items())]
    lines.append(f"memory: {settled:.0f} MiB when settled, {memory[-1][1]:.0f} MiB at the end ({growth:+.0f})")
    lines.append(f"in use at the end: {busy or 'nothing'}")
    report = "\n".join(lines)
    if faults:
        raise UserError(f"{len(faults)} wrong answers, such as {faults[0]}\n{report}")
    if busy or growth > GROWTH_MIB:
        raise UserError(f"the server did not recover\n{report}")
    return report


def _complete(target: Target, draw: random.Random) -> str:
    status, body = _post(target.port, _body(target, draw))
    if status == 200:
        return "completed" if json.loads(body)["usage"]["completion_tokens"] else "fault: completed nothing"
    return "queue full" if status == 429 else f"fault: {status} {body!r}"


def _stream(target: Target, draw: random.Random) -> str:
    status, body = _post(target.port, _body(target, draw) | {"stream": True})
    if status == 200:
        return "streamed" if body.endswith(b"data: [DONE]\n\n") else f"fault: a stream ended with {body[-200:]!r}"
    return "queue full" if status == 429 else f"fault: {status} {body!r}"


def _leave(target: Target, draw: random.Random) -> str:
    """Read the beginning of a stream, and disconnect."""
    with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S) as connection:
        connection.sendall(_request(_body(target, draw) | {"stream": True, "max_tokens": 500}))
        begin = connection.recv(draw.randrange(16, 4000))
    return "queue full" if b" 429 " in begin else "left" if b" 200 " in begin else f"fault: {begin!r}"


def _leave_at_once(target: Target, draw: random.Random) -> str:
    """Send a request or half of it, and disconnect."""
    request = _request(_body(target, draw) | {"stream": draw.random() < 0.5, "max_tokens": 500})
    with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S) as connection:
        connection.sendall(request[: draw.choice([len(request), len(request) // 2])])
        if draw.random() < 0.5:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    return "left at once"


def _rubbish(target: Target, draw: random.Random) -> str:
    if draw.random() < 0.2:
        with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S) as connection:
            connection.sendall(draw.randbytes(200) + b"\r\n\r\n")
            connection.recv(100)
        return "rubbish refused"
    status, body = _post(target.port, draw.choice(RUBBISH))
    return "rubbish refused" if status == 400 else f"fault: {status} {body!r} for rubbish"


def _body(target: Target, draw: random.Random) -> dict[str, Any]:
    return {
        "prompt": [draw.randrange(200) for _ in range(draw.randint(1, target.longest_prompt))],
        "max_tokens": draw.randrange(1, 120),
        "n": draw.choice([1, 1, 1, 2]),
        "temperature": draw.choice([0, 0.7, 1.5]),
        "repetition_penalty": draw.choice([1, 1.2]),
        "logprobs": draw.choice([None, None, 0, 3]),
        "echo": draw.random() < 0.2,
        "stop": draw.choice([None, "e", [" the", "x"]]),
        "ignore_eos": True,
    }


def _request(body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    return f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + text


def _post(port: int, body: dict[str, Any] | bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _gauges(port: int) -> dict[str, float]:
    """Return what is in use now."""
    names = ("pipeline_queue_length", "pipeline_running_requests", "pipeline_cache_slots_used")
    pairs = (line.split() for line in _get(port, "/metrics").splitlines() if line.startswith(names))
    return {name: float(value) for name, value in pairs}


def _get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


if __name__ == "__main__":
    main()
