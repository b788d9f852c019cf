"""Measure what traces cost a server: the same requests to two servers in turn, of which one sends a trace of each.

Both servers run all the time, and the one that is not asked waits. A receiver in a process of its own reads the traces.
Each round asks both, in an order that changes; the result is the ratio of their rates.
"""

import argparse
import http.server
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import one_engine
from contenders import PEER_LIBRARIES, parse_contender
from serve import drive, requests_of, serve_command, served

from pipeline import machine
from pipeline.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_engine.add_options(parser)
    parser.add_argument("--texts", action="store_true", help="the traces contain the texts")
    parser.add_argument("--streams", type=int, default=8, help="number of clients at once (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=48, help="requests per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    one_engine.run(parser.parse_args(), benchmark)


def benchmark(arguments: argparse.Namespace, engine: Path, threads: int) -> str:
    contender = parse_contender(f"engine-{arguments.precision}", "cpu")
    asked = requests_of(arguments.requests)
    ends, receiving = multiprocessing.Pipe()
    receiver = multiprocessing.Process(target=receive, args=(receiving,), daemon=True)
    receiver.start()
    address = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{ends.recv()}/v1/traces"}
    options = ["--trace-texts"] if arguments.texts else []
    rates: dict[str, list[float]] = {"silent": [], "traced": []}
    command = serve_command(engine, arguments.precision, threads, max_queue=len(asked))
    with served(contender, command) as silent, served(contender, [*command, *options], address) as traced:
        servers = {"silent": silent, "traced": traced}
        for server in servers.values():
            drive(server, asked, arguments.streams)
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            for name in sorted(servers, reverse=bool(number % 2)):
                done = drive(servers[name], asked, arguments.streams)
                if done.lost:
                    raise UserError(f"{name}: {done.lost} requests were lost")
                rates[name].append(done.rate)
    ends.send(None)
    received = ends.recv()
    expected = (arguments.rounds + 1) * len(asked)
    if received != expected:
        raise UserError(f"the receiver got {received} traces of {expected} requests")
    return report(arguments, threads, rates, received)


def report(arguments: argparse.Namespace, threads: int, rates: dict[str, list[float]], received: int) -> str:
    ratios = np.array(rates["traced"]) / np.array(rates["silent"])
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    lines = [
        *(f"{name}: {value}" for name, value in machine.describe(PEER_LIBRARIES).items()),
        f"checkpoint: {Path(arguments.checkpoint).name}, {arguments.precision}; {threads} threads",
        f"{arguments.requests} requests per round, from {arguments.streams} clients at once",
        "",
        *(f"{name}: median of {np.median(own):.0f} tokens/s" for name, own in rates.items()),
        f"traces received: {received:,}{', with texts' if arguments.texts else ''}",
        f"traced / silent: {middle:.3f} × ({low:.3f} to {high:.3f} between the quartiles of {len(ratios)} rounds)",
        f"standard error of the mean ratio {ratios.mean():.3f}: {ratios.std(ddof=1) / np.sqrt(len(ratios)):.3f}",
    ]
    return "\n".join(lines) + "\n"


def receive(ends: Connection) -> None:
    """Send the port of a receiver of OTLP over HTTP; at a message, send how many spans it got, and end."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = 0

    class Receiver(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal spans
            message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans += sum(len(scope.spans) for part in message.resource_spans for scope in part.scope_spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        server.timeout = 0.1
        ends.send(server.server_port)
        while not ends.poll():
            server.handle_request()
        ends.send(spans)


if __name__ == "__main__":
    main()
