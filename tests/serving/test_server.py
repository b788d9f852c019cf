"""The server as a process: it prints its address, ends when all is done, and refuses in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from isolated_store import VARIABLES
from otlp_receiver import receiving
from served_model import PATIENCE_S, wait_for

ROOT = Path(__file__).parents[2]


def accepts(url: str) -> bool:
    try:
        return requests.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200
    except requests.ConnectionError:
        return False


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "serve", *arguments]


@contextmanager
def running(folder: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server with more environment variables, and yield its process and its address."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    options = ["--port", "0", "--precision", "float32", "--provider", "cpu", "--threads", "1"]
    started = subprocess.Popen(
        command("--model", str(folder), *options),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment | variables,
    )
    assert started.stdout is not None
    found = re.match(r"(http://127\.0\.0\.1:\d+)/ ", started.stdout.readline())
    assert found is not None
    url = found[1]
    try:
        yield started, url
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


@pytest.fixture
def process(tiny_engine_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with running(tiny_engine_folder) as started:
        yield started


def test_a_signal_lets_it_finish_what_runs(process: tuple[subprocess.Popen[str], str]) -> None:
    started, url = process
    texts: dict[int, str] = {}
    begun = threading.Barrier(9)

    def stream(seed: int) -> None:
        body: dict[str, Any] = {"prompt": "The lamp", "max_tokens": 60, "ignore_eos": True, "seed": seed, "n": 8}
        asked = {**body, "stream": True}
        with requests.post(f"{url}/v1/completions", json=asked, stream=True, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            first = next(lines)
            begun.wait(PATIENCE_S)
            events = [line.removeprefix(b"data: ") for line in (first, *lines) if line]
            assert events[-1] == b"[DONE]"
            texts[seed] = json.loads(events[-2])["usage"]["completion_tokens"]

    threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    begun.wait(PATIENCE_S)
    started.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert started.wait(PATIENCE_S) in (0, -signal.SIGTERM)


def test_a_signal_ends_an_idle_server(process: tuple[subprocess.Popen[str], str]) -> None:
    started, url = process
    assert requests.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200
    started.send_signal(signal.SIGINT)
    wait_for(lambda: started.poll() is not None)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_it_send_the_traces_that_wait(sent: signal.Signals, tiny_engine_folder: Path) -> None:
    with receiving() as receiver:
        # They would wait for an hour.
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
        with running(tiny_engine_folder, **variables) as (started, url):
            requests.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=PATIENCE_S)
            started.send_signal(sent)
            wait_for(lambda: started.poll() is not None)
        assert len(receiver.spans) == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(second: signal.Signals, process: tuple[subprocess.Popen[str], str]) -> None:
    started, url = process
    body = {"prompt": "a", "max_tokens": 10**8, "context_overflow": "slide", "ignore_eos": True, "stream": True}
    with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=PATIENCE_S) as response:
        next(response.iter_lines())
        started.send_signal(signal.SIGTERM)
        wait_for(lambda: not accepts(url))
        started.send_signal(second)
        wait_for(lambda: started.poll() is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "nowhere: holds no engine"),
        (["--slots", "0"], "slots: 0 is out of range"),
        (["--max-queue", "-1"], "--max-queue: -1 is out of range"),
        (["--max-slots-per-client", "0"], "--max-slots-per-client: 0 is out of range"),
        (["--timeout-s", "0"], "--timeout-s: 0 is out of range"),
        (["--model", "models:/x@y"], "there is no tracking store here"),
    ],
)
def test_it_refuses_in_one_line(arguments: list[str], message: str, tiny_engine_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        command("--model", str(tiny_engine_folder), "--port", "0", *arguments),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 or "provider" in done.stderr
