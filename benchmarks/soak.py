"""Load a server with honest clients and, beside them, with hostile ones, and check that it holds.

Starts a server on an engine folder, or on an engine with random weights. Honest clients stream: no token may be lost,
and none may come late. Every answer to a hostile client must be the right one, too. Memory must not grow, every slot
must be free at the end, and the server must end within its timeout although some clients neither read nor write.
"""

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import psutil
from conversion import ROOT, export_engine
from decode import find_checkpoint
from hostile import JSON, PATIENCE_S, Target, attack_together, hold_open

from pipeline.errors import UserError, report_errors

SETTLED_TENTH = 3
"""The tenth of the time from which on memory should not grow."""
GROWTH_MIB = 48
"""The growth that is allowed in a long soak, because allocators fragment memory."""
LEAST_SECONDS = 300
"""The time that memory takes to settle."""
TIMEOUT_S = 20
"""The server's timeout of a request."""
HEALTH_EVERY_S = 0.1
RETRY_S = 0.2
LONGEST_ANSWER = 120


@dataclass
class Record:
    """What the clients have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    waits_s: list[float] = field(default_factory=list)
    """The time between each two events of an honest stream."""
    health_s: list[float] = field(default_factory=list)
    """The time to each answer of /health."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: str, waits_s: list[float] | None = None) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            self.waits_s += waits_s or []

    @property
    def faults(self) -> list[str]:
        return [outcome for outcome in self.outcomes if outcome.startswith("fault")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="an engine folder (default: one of tiny random weights)")
    parser.add_argument("--precision", default="auto", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=600, help="default: %(default)g")
    parser.add_argument("--clients", type=int, default=16, help="honest clients (default: %(default)s)")
    parser.add_argument("--hostile", type=int, default=4, help="hostile clients (default: %(default)s)")
    parser.add_argument(
        "--longest-wait-s", type=float, default=0.5, help="the longest wait for a token (default: %(default)g)"
    )
    parser.add_argument("--work", type=Path, default=Path("out") / "benchmarks", help="default: %(default)s")
    arguments = parser.parse_args()
    with report_errors():
        engine = arguments.engine or tiny_engine(arguments.work)
        report, problems = soak(engine, arguments.precision, arguments.seconds, arguments.clients, arguments.hostile)
        waits = max(report.waits_s, default=0.0)
        if waits > arguments.longest_wait_s:
            problems.append(f"a token came after {waits:.2f} s, the limit is {arguments.longest_wait_s:g} s")
        if problems:
            raise UserError(f"the server did not hold: {'; '.join(problems)}")


def tiny_engine(work: Path) -> Path:
    folder = work / "soak"
    if not folder.exists():
        export_engine(find_checkpoint("tiny", work), folder, ["float32"])
    return folder


def soak(engine: Path, precision: str, seconds: float, clients: int, hostile: int) -> tuple[Record, list[str]]:
    """Run the clients, print what they saw, and return it with what was wrong."""
    command = ["-m", "pipeline", "serve", "--model", str(engine.resolve()), "--precision", precision]
    process = subprocess.Popen(
        [sys.executable, *command, "--provider", "cpu", "--port", "0", "--timeout-s", str(TIMEOUT_S)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        found = re.search(r"127\.0\.0\.1:(\d+)/", process.stdout.readline() if process.stdout else "")
        if found is None:
            raise UserError("the server does not start")
        (card,) = json.loads(_get(int(found[1]), "/v1/models"))["data"]
        target = Target(int(found[1]), card["context_length"], card["vocabulary_size"])
        record, problems = _load(target, psutil.Process(process.pid), seconds, clients, hostile)
        problems += _end(target, process)
        return record, problems
    finally:
        process.kill()
        process.wait()


def _load(
    target: Target, process: psutil.Process, seconds: float, clients: int, hostile: int
) -> tuple[Record, list[str]]:
    ends, record = time.monotonic() + seconds, Record()

    def work(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < ends:
            try:
                record.add(*_stream(target, draw))
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                record.add(f"fault: {error!r} in a stream")

    def watch() -> None:
        while time.monotonic() < ends:
            began = time.monotonic()
            _get(target.port, "/health")
            record.health_s.append(time.monotonic() - began)
            time.sleep(HEALTH_EVERY_S)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    threads.append(threading.Thread(target=watch))
    memory, began = [], time.monotonic()
    # In a process of their own, or what they write and read would delay what the honest ones measure.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        attacks = pool.submit(attack_together, target, hostile, seconds)
        for thread in threads:
            thread.start()
        while time.monotonic() < ends:
            time.sleep(min(1.0, seconds / 20))
            memory.append((time.monotonic() - began, process.memory_info().rss / 2**20))
        for thread in threads:
            thread.join()
        record.outcomes += attacks.result()
    # Parts of requests come and go: the lowest point of each tenth of the time says what stays.
    tenths = [
        min(mib for at, mib in memory if tenth * seconds / 10 <= at < (tenth + 1) * seconds / 10) for tenth in range(10)
    ]
    growth = tenths[-1] - tenths[SETTLED_TENTH]
    deadline = time.monotonic() + PATIENCE_S
    while (busy := {name: value for name, value in _gauges(target.port).items() if value}) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    for outcome, count in sorted(record.outcomes.items()):
        print(f"{count:7} {outcome}")
    for name, found in (("tokens of honest streams", record.waits_s), ("/health", record.health_s)):
        ordered = sorted(found) or [0.0]
        high, longest = ordered[int(0.99 * len(ordered))], ordered[-1]
        print(f"waits for {name}: {len(found):,}, 99 % within {1000 * high:.0f} ms, longest {1000 * longest:.0f} ms")
    least = " ".join(f"{mib:.0f}" for mib in tenths)
    print(f"memory: at least {least} MiB in each tenth of the time, {max(mib for _, mib in memory):.0f} MiB at most")
    print(f"in use at the end: {busy or 'nothing'}")
    problems = [f"{len(record.faults)} kinds of wrong answers, such as {record.faults[0]}"] if record.faults else []
    problems += [f"{busy} stayed in use"] if busy else []
    problems += [f"memory grew by {growth:.0f} MiB"] if growth > GROWTH_MIB and seconds >= LEAST_SECONDS else []
    return record, problems


def _end(target: Target, process: "subprocess.Popen[str]") -> list[str]:
    """End the server while clients hold connections; return what was wrong."""
    held = hold_open(target)
    time.sleep(1)
    began = time.monotonic()
    process.terminate()
    try:
        process.wait(2 * TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [f"the server did not end within {2 * TIMEOUT_S} s"]
    finally:
        for connection in held:
            connection.close()
    print(f"ended {time.monotonic() - began:.1f} s after SIGTERM, with the timeout of a request at {TIMEOUT_S} s")
    return []


def _stream(target: Target, draw: random.Random) -> tuple[str, list[float]]:
    """Read a stream to its end; return the waits between its events, in seconds."""
    tokens = draw.randint(1, LONGEST_ANSWER)
    prompt = [draw.randrange(200) for _ in range(draw.randint(1, target.context_length // 3))]
    body = {
        **{"prompt": prompt, "max_tokens": min(tokens, target.context_length // 2), "ignore_eos": True},
        **{"stream": True, "temperature": draw.choice([0, 0.7, 1.5]), "repetition_penalty": draw.choice([1, 1.2])},
        "logprobs": draw.choice([None, None, None, 3]),
    }
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=PATIENCE_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body).encode(), JSON)
        response = connection.getresponse()
        if response.status == 429:
            time.sleep(RETRY_S)
            return "honest: queue full", []
        if response.status != 200:
            return f"fault: {response.status} {response.read()!r}", []
        times, usage = [], 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            times.append(time.monotonic())
            usage = json.loads(line[6:]).get("usage", {}).get("completion_tokens", usage)
            if b'"error"' in line:
                return f"fault: a stream ended with {line!r}", []
        waits = [later - earlier for earlier, later in pairwise(times)]
        return ("honest: streamed" if usage == body["max_tokens"] else f"fault: {usage} tokens of {body}"), waits
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
