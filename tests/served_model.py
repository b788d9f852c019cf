"""Run a server on a port of 127.0.0.1 in a thread of the test's process, and send it requests."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import requests
import uvicorn
from fastapi import FastAPI

from pipeline.decoding import ModelDecoding, SamplingParams
from pipeline.engine.text import TextGenerator
from pipeline.serving.app import create_app
from pipeline.serving.metrics import Metrics
from pipeline.serving.options import Access, Limits
from pipeline.serving.served import FolderSource, Served, Source

if TYPE_CHECKING:
    from pipeline.serving.traces import Traces

DECODING = ModelDecoding(
    SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=12),
    {
        "balanced": SamplingParams(temperature=0.9, min_p=0.02, max_new_tokens=14),
        # Far enough apart that texts of a model with random weights differ.
        "faithful": SamplingParams(temperature=0.0, max_new_tokens=10),
        "adventurous": SamplingParams(temperature=1.3, typical_p=0.95, repetition_detection=(8, 3), max_new_tokens=16),
    },
)
SLOTS = 4
PATIENCE_S = 30


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    served: Served

    def post(self, **body: object) -> requests.Response:
        return requests.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S)

    def metric(self, name: str) -> float:
        """Return a metric by its full name, with its labels if it has any."""
        lines = requests.get(f"{self.url}/metrics", timeout=PATIENCE_S).text.splitlines()
        (value,) = (line.rpartition(" ")[2] for line in lines if line.rpartition(" ")[0] == name)
        return float(value)


def served_folder(
    folder: Path, *, source: Source | None = None, max_queue: int = 8, slots_per_client: int | None = None
) -> tuple[Served, Metrics]:
    """Return an engine folder in float32 on one core, ready to be served."""
    metrics = Metrics()

    def load(engine: Path, provider: str | None) -> TextGenerator:
        return TextGenerator.load(engine, precision="float32", provider=provider or "cpu", threads=1, slots=SLOTS)

    source = source or FolderSource(folder, DECODING)
    served = Served(
        source,
        load,
        max_queue=max_queue,
        slots_per_client=slots_per_client,
        on_tokens=metrics.on_tokens,
        watch_seconds=0.05,
    )
    return served, metrics


@contextmanager
def running_server(
    folder: Path,
    *,
    source: Source | None = None,
    max_queue: int = 8,
    slots_per_client: int | None = None,
    limits: Limits | None = None,
    access: Access | None = None,
    root_path: str = "",
    checks_host: bool = False,
    traces: "Traces | None" = None,
) -> Iterator[Running]:
    served, metrics = served_folder(folder, source=source, max_queue=max_queue, slots_per_client=slots_per_client)
    app = create_app(
        served,
        metrics,
        limits or Limits(),
        access or Access(),
        root_path=root_path,
        checks_host=checks_host,
        traces=traces,
    )
    with serve_app(app) as url:
        yield Running(url, served)


@contextmanager
def serve_app(app: FastAPI) -> Iterator[str]:
    """Serve an application, and yield its address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE_S))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            wait_for(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_for(holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    end = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.01)
