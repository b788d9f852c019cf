"""Compare the server with the engine alone and with llama.cpp's llama-server, on the same requests and sampling.

Prompts and continuations have mixed lengths. Each stream is a client that sends its next request when the last one has
ended. In every round, each contender serves all requests once. The engine alone gets all of them at once, without a
server. llama-server is left out if it is not found; docs/serving.md says how to build it, and how it is set up.
"""

import argparse
import http.client
import json
import os
import shutil
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
from worker import peak_memory

from pipeline import machine
from pipeline.cores import usable_cores
from pipeline.decoding import SamplingParams
from pipeline.errors import UserError, report_errors

PROMPT_WORDS = (4, 40)
NEW_TOKENS = (16, 192)
"""The ranges that lengths are drawn from uniformly. A word is four tokens of the stand-in tokenizer, one of GPT-2's."""
WORDS = ("the", "lamp", "on", "gull", "rock", "went", "out", "before", "morning", "and", "nobody", "said", "so", "but")
PEERS = {"int8": "llama.cpp-q8_0", "int4": "llama.cpp-q4_0", "float32": "llama.cpp-f32"}
SLOTS = 8
CONTEXT_TOKENS = 1024
WARM_REQUESTS = 4
"""The requests that a server answers before it is timed. They are not among the timed ones, which llama-server would
otherwise find in its cache."""
START_S = 300


@dataclass(frozen=True)
class Asked:
    """A request."""

    prompt: str
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Server:
    """A process that answers requests."""

    contender: Contender
    process_id: int
    port: int


@dataclass
class Served:
    """The measurements of one round, as its clients saw it."""

    seconds: float = 0.0
    tokens: int = 0
    lost: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """The most memory that the server has held, mapped files included; 0 without a server."""

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
    parser.add_argument("--llama-server", metavar="PROGRAM", help="default: llama-server on the PATH")
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
    peer = parse_contender(PEERS[arguments.precision], "cpu")
    program = shutil.which(arguments.llama_server or "llama-server")
    if program is None and arguments.llama_server is not None:
        raise UserError(f"llama-server: {arguments.llama_server} is no program; name its file")
    checkpoint = find_checkpoint(arguments.checkpoint, arguments.work)
    contenders = [parse_contender(f"engine-{arguments.precision}", "cpu")]
    left_out: dict[str, str] = {}
    if program is None:
        left_out[peer.name] = "llama-server is not on the PATH (docs/serving.md says how to build it)"
    else:
        contenders.append(peer)
    folders = {
        contender: folder
        for contender, (folder, _) in prepare(
            checkpoint, contenders, threads, arguments.work / "serve", left_out
        ).items()
    }
    commands = {
        contender: [str(Path(program).resolve()), "--model", str(folder.resolve() / GGUF_FILE), *llama_options(threads)]
        if program is not None and contender == peer
        else serve_command(folder, contender.precision, threads, max_queue=arguments.requests)
        for contender, folder in folders.items()
    }
    both = requests_of(WARM_REQUESTS + arguments.requests)
    warm, asked = both[:WARM_REQUESTS], both[WARM_REQUESTS:]
    found: dict[tuple[int, str], list[Served]] = {}
    for count in streams:
        for number in range(arguments.rounds):
            print(f"{count} streams: round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            if count > 1:
                engine = folders[contenders[0]]
                found.setdefault((count, "engine alone"), []).append(
                    run_alone(engine, arguments.precision, threads, asked)
                )
            for contender, command in commands.items():
                with served(contender, command) as server:
                    drive(server, warm, len(warm))
                    found.setdefault((count, contender.name), []).append(drive(server, asked, count))
    facts = machine.describe(PEER_LIBRARIES)
    if program is not None:
        facts["llama-server"] = f"{llama_version(program)}; {' '.join(llama_options(threads))}"
    return report(arguments, threads, found, left_out, facts)


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
        "ignore_eos": True,
        "temperature": SAMPLED.temperature,
        "top_k": SAMPLED.top_k,
        "top_p": SAMPLED.top_p,
    }
    if contender.family == "engine":
        return body | {"repetition_penalty": SAMPLED.repetition_penalty}
    # By default, llama-server has a min-p of 0.05, penalizes only the last 64 tokens, and applies the temperature last.
    # Top-k is the same before and after the temperature, and leaves it less to do.
    return body | {
        "repeat_penalty": SAMPLED.repetition_penalty,
        "repeat_last_n": CONTEXT_TOKENS,
        "samplers": ["penalties", "top_k", "temperature", "top_p"],
    }


def serve_command(folder: Path, precision: str, threads: int, *, max_queue: int) -> list[str]:
    """Return the command that serves an engine, without its port."""
    command = [sys.executable, "-m", "pipeline", "serve", "--model", str(folder.resolve()), "--precision", precision]
    command += ["--provider", "cpu", "--threads", str(threads), "--slots", str(SLOTS), "--max-queue", str(max_queue)]
    return command


def llama_options(threads: int) -> list[str]:
    """Return the options that llama-server needs to hold as many continuations of GPT-2's context as our server."""
    return ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT_TOKENS), "--threads", str(threads)]


def llama_version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).partition("\n")[0].removeprefix("version: ")


@contextmanager
def served(
    contender: Contender, command: Sequence[str], variables: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a server as a process with more environment variables; yield it once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_it_answers(process, port, contender)
        yield Server(contender, process.pid, port)
    finally:
        process.terminate()
        process.wait()


def drive(server: Server, asked: Sequence[Asked], streams: int) -> Served:
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
            times = stream(server.port, body_of(one, server.contender))
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
    total.peak_bytes = peak_memory(server.process_id)
    return total


def stream(port: int, body: dict[str, Any]) -> list[float] | None:
    """Return when a request was sent and when each event with text arrived; None if it did not get all its tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    times = [time.perf_counter()]
    last: dict[str, Any] = {}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                arrived = time.perf_counter()
                last = json.loads(line.removeprefix(b"data: "))
                # llama-server's last event has no text, and comes with the one before it.
                if last.get("choices") and last["choices"][0]["text"]:
                    times.append(arrived)
    except OSError:
        return None
    finally:
        connection.close()
    is_whole = last.get("usage", {}).get("completion_tokens") == body["max_tokens"]
    return times if is_whole and last["choices"][0]["finish_reason"] == "length" else None


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
    facts: Mapping[str, str],
) -> str:
    lines = [
        *(f"{name}: {value}" for name, value in facts.items()),
        f"checkpoint: {Path(arguments.checkpoint).name}, {arguments.precision}; {threads} threads, {SLOTS} slots",
        f"requests: {arguments.requests}, prompts of {PROMPT_WORDS[0]} to {PROMPT_WORDS[1]} words, "
        f"continuations of {NEW_TOKENS[0]} to {NEW_TOKENS[1]} tokens; "
        f"median of {arguments.rounds} rounds",
        "memory: the most that the server's process held, mapped files included",
        "",
        f"{'streams':>7} {'':22} {'tokens/s':>9} {'first token, s':>16} {'between events, ms':>20} {'MiB, peak':>10} "
        f"{'lost':>5}",
        f"{'':7} {'':22} {'':9} {'p50':>8}{'p99':>8} {'p50':>10}{'p99':>10}",
    ]
    for (streams, name), rounds in found.items():
        first, between = ([one for own in rounds for one in getattr(own, kind)] for kind in ("first_s", "between_s"))
        times = " " * 48
        if first:
            times = f"{_quantile(first, 50):8.2f}{_quantile(first, 99):8.2f} "
            times += f"{1000 * _quantile(between, 50):10.1f}{1000 * _quantile(between, 99):10.1f} "
            times += f"{max(own.peak_bytes for own in rounds) / 2**20:10,.0f}"
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
