"""Compare the server with the engine alone and with llama.cpp's server, on the same requests and sampling.

Prompts and continuations have mixed lengths. Each stream is a client that sends its next request when the last one has
ended. In every round, each contender serves all requests once. The engine alone gets all of them at once, without a
server. llama.cpp's server is included if `pip install 'llama-cpp-python[server]'` has installed it.
"""

import argparse
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from contenders import PEER_LIBRARIES, SAMPLED, Contender, parse_contender
from conversion import GGUF_FILE, ROOT
from decode import find_checkpoint, prepare
from report import publish

from pipeline import machine
from pipeline.cores import usable_cores
from pipeline.decoding import SamplingParams
from pipeline.errors import UserError, report_errors

PROMPT_WORDS = (4, 40)
NEW_TOKENS = (16, 192)
"""The ranges that lengths are drawn from uniformly. A word is four tokens of the stand-in tokenizer, one of GPT-2's."""
WORDS = ("the", "lamp", "on", "gull", "rock", "went", "out", "before", "morning", "and", "nobody", "said", "so", "but")
PEERS = {"int8": "llama.cpp-q8_0", "int4": "llama.cpp-q4_0", "float32": "llama.cpp-f32"}
START_S = 300


@dataclass(frozen=True)
class Asked:
    """A request."""

    prompt: str
    max_tokens: int
    seed: int


@dataclass
class Served:
    """The measurements of one round, as its clients saw it."""

    seconds: float = 0.0
    tokens: int = 0
    lost: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="medium", help="a folder, medium or tiny (default: %(default)s)")
    parser.add_argument("--precision", choices=PEERS, default="int8", help="default: %(default)s")
    parser.add_argument(
        "--streams",
        default="1,8,32",
        help="numbers of clients at once, one part of the benchmark each (default: %(default)s)",
    )
    parser.add_argument("--requests", type=int, default=48, help="requests per part (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: the number of physical cores")
    parser.add_argument("--work", type=Path, default=Path("out") / "benchmarks", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument(
        "--alone",
        type=Path,
        metavar="ENGINE",
        help="set by the benchmark for a process of its own: read requests as JSON from standard input, print how many "
        "seconds this engine takes for them without a server, and end",
    )
    arguments = parser.parse_args()
    with report_errors():
        threads = arguments.threads or usable_cores()
        if arguments.alone is not None:
            alone(arguments.alone, arguments.precision, threads)
            return
        streams = [int(number) for number in arguments.streams.split(",")]
        text = benchmark(arguments, streams, threads)
        publish(text, arguments.out)


def benchmark(arguments: argparse.Namespace, streams: Sequence[int], threads: int) -> str:
    checkpoint = find_checkpoint(arguments.checkpoint, arguments.work)
    contenders = [parse_contender(f"engine-{arguments.precision}", "cpu")]
    left_out: dict[str, str] = {}
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("starlette_context"):
        contenders.append(parse_contender(PEERS[arguments.precision], "cpu"))
    else:
        left_out[PEERS[arguments.precision]] = "its server is not installed (pip install 'llama-cpp-python[server]')"
    folders = {
        contender: folder
        for contender, (folder, _) in prepare(
            checkpoint, contenders, threads, arguments.work / "serve", left_out
        ).items()
    }
    asked = requests_of(arguments.requests)
    found: dict[tuple[int, str], list[Served]] = {}
    for count in streams:
        for number in range(arguments.rounds):
            print(f"{count} streams: round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            if count > 1:
                engine = folders[contenders[0]]
                found.setdefault((count, "engine alone"), []).append(
                    run_alone(engine, arguments.precision, threads, asked)
                )
            for contender in folders:
                with served(contender, folders[contender], threads, max_queue=len(asked)) as port:
                    drive(port, contender, asked[: min(4, len(asked))], 4)
                    found.setdefault((count, contender.name), []).append(drive(port, contender, asked, count))
    return report(arguments, threads, found, left_out)


def requests_of(count: int) -> list[Asked]:
    """Requests of mixed lengths, the same on every call."""
    generator = np.random.default_rng(7)
    words, tokens = (
        generator.integers(*between, size=count, endpoint=True).tolist() for between in (PROMPT_WORDS, NEW_TOKENS)
    )
    return [
        Asked(" ".join(generator.choice(WORDS, size=length)), most, seed)
        for seed, (length, most) in enumerate(zip(words, tokens, strict=True))
    ]


def body_of(asked: Asked, contender: Contender) -> dict[str, Any]:
    """Return a request in the contender's API, such that no continuation ends before its last token."""
    body: dict[str, Any] = {
        "prompt": asked.prompt,
        "max_tokens": asked.max_tokens,
        "seed": asked.seed,
        "stream": True,
        "temperature": SAMPLED.temperature,
        "top_k": SAMPLED.top_k,
        "top_p": SAMPLED.top_p,
    }
    if contender.family == "engine":
        return body | {"repetition_penalty": SAMPLED.repetition_penalty, "ignore_eos": True}
    # This API cannot ignore end-of-text, but random weights hardly ever draw it.
    return body | {"repeat_penalty": SAMPLED.repetition_penalty}


@contextmanager
def served(
    contender: Contender,
    folder: Path,
    threads: int,
    *,
    max_queue: int,
    options: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Start a server as a process with more options and environment variables; yield its port once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if contender.family == "engine":
        command = ["-m", "pipeline", "serve", "--model", str(folder.resolve()), "--precision", contender.precision]
        command += ["--provider", "cpu", "--threads", str(threads), "--max-queue", str(max_queue)]
    else:
        command = ["-m", "llama_cpp.server", "--model", str(folder / GGUF_FILE), "--n_ctx", "1024"]
        command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--verbose", "false"]
        command += ["--interrupt_requests", "false"]
    process = subprocess.Popen(
        [sys.executable, *command, *options, "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_it_answers(process, port, contender)
        yield port
    finally:
        process.terminate()
        process.wait()


def drive(port: int, contender: Contender, asked: Sequence[Asked], streams: int) -> Served:
    """Send all requests from `streams` clients at once, and time them."""
    total = Served()
    lock = threading.Lock()
    left = iter(asked)

    def client() -> None:
        while True:
            with lock:
                one = next(left, None)
            if one is None:
                return
            times = stream(port, body_of(one, contender))
            with lock:
                # An event is one token, or the tokens of one character; with the stand-in tokenizer there are half as
                # many events as tokens.
                if times is None:
                    total.lost += 1
                    continue
                total.tokens += one.max_tokens
                total.first_s.append(times[1] - times[0])
                total.between_s += np.diff(times[1:]).tolist()

    began = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total.seconds = time.perf_counter() - began
    return total


def stream(port: int, body: dict[str, Any]) -> list[float] | None:
    """Return when a request was sent and when each event arrived; None if it ended before its last token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    times = [time.perf_counter()]
    last = b""
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        for line in response:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
                last = line
    except OSError:
        return None
    finally:
        connection.close()
    if not last:
        return None
    choices = json.loads(last.removeprefix(b"data: ")).get("choices")
    return times if choices and choices[0]["finish_reason"] == "length" else None


def run_alone(folder: Path, precision: str, threads: int, asked: Sequence[Asked]) -> Served:
    """Time the engine on the same requests in its own process, without a server."""
    command = [sys.executable, __file__, "--alone", str(folder), "--precision", precision, "--threads", str(threads)]
    given = json.dumps([[one.prompt, one.max_tokens, one.seed] for one in asked])
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True)
    seconds = float(done.stdout)
    return Served(seconds=seconds, tokens=sum(one.max_tokens for one in asked))


def alone(folder: Path, precision: str, threads: int) -> None:
    """Print how many seconds the requests on standard input take; `run_alone` starts this with `--alone`."""
    from pipeline.engine.text import TextGenerator

    generator = TextGenerator.load(folder, precision=precision, provider="cpu", threads=threads)
    asked = [Asked(*entry) for entry in json.load(sys.stdin)]
    params = [
        SamplingParams(
            temperature=SAMPLED.temperature,
            top_k=SAMPLED.top_k,
            top_p=SAMPLED.top_p,
            repetition_penalty=SAMPLED.repetition_penalty,
            max_new_tokens=one.max_tokens,
            ignore_eos=True,
            seed=one.seed,
        )
        for one in asked
    ]
    warm = slice(0, generator.engine.session.slots)
    generator.complete([one.prompt for one in asked[warm]], params[warm])
    began = time.perf_counter()
    generator.complete([one.prompt for one in asked], params)
    print(time.perf_counter() - began)


def report(
    arguments: argparse.Namespace,
    threads: int,
    found: dict[tuple[int, str], list[Served]],
    left_out: dict[str, str],
) -> str:
    lines = [
        *(f"{name}: {value}" for name, value in machine.describe(PEER_LIBRARIES).items()),
        f"checkpoint: {Path(arguments.checkpoint).name}, {arguments.precision}; {threads} threads, 8 slots",
        f"requests: {arguments.requests}, prompts of {PROMPT_WORDS[0]} to {PROMPT_WORDS[1]} words, "
        f"continuations of {NEW_TOKENS[0]} to {NEW_TOKENS[1]} tokens; "
        f"median of {arguments.rounds} rounds",
        "",
        f"{'streams':>7} {'':22} {'tokens/s':>9} {'first token, s':>16} {'between events, ms':>20} {'lost':>5}",
        f"{'':7} {'':22} {'':9} {'p50':>8}{'p99':>8} {'p50':>10}{'p99':>10}",
    ]
    for (streams, name), rounds in found.items():
        first, between = ([one for own in rounds for one in getattr(own, kind)] for kind in ("first_s", "between_s"))
        times = " " * 37
        if first:
            times = f"{_quantile(first, 50):8.2f}{_quantile(first, 99):8.2f} "
            times += f"{1000 * _quantile(between, 50):10.1f}{1000 * _quantile(between, 99):10.1f}"
        rate, lost = median(own.rate for own in rounds), sum(own.lost for own in rounds)
        lines.append(f"{streams:7} {name:22} {rate:9.1f} {times} {lost:5}")
    lines.append("")
    ours = f"engine-{arguments.precision}"
    for (streams, name), rounds in found.items():
        if name != ours:
            ratios = [mine.rate / other.rate for mine, other in zip(found[streams, ours], rounds, strict=True)]
            shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"{streams} streams, server / {name}: {median(ratios):.2f} × ({shown})")
    lines += [f"left out: {name}, {reason}" for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def _quantile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent))


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, contender: Contender) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/v1/models")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise UserError(f"{contender.name}: its server does not start")


if __name__ == "__main__":
    main()
