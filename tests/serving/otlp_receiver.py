"""A receiver of traces by OTLP over HTTP, as a collector is one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from served_model import wait_for


@dataclass
class Receiver:
    """What has been sent to `url`, and how that is answered."""

    url: str
    status: int = 200
    holds: bool = False
    """Whether answers wait until the receiver ends."""
    over: Event = field(default_factory=Event)
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    """The headers of each request, in lower case."""
    bodies: list[bytes] = field(default_factory=list)

    def wait_for_spans(self, count: int) -> list[Span]:
        wait_for(lambda: len(self.spans) >= count)
        return self.spans


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Receive on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.paths.append(self.path)
            receiver.headers.append({name.lower(): value for name, value in self.headers.items()})
            receiver.bodies.append(body)
            if receiver.holds:
                receiver.over.wait()
            if receiver.status == 200:
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    receiver.resources.append(values_of(resource.resource.attributes))
                    receiver.spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(receiver.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield receiver
        finally:
            receiver.over.set()
            server.shutdown()
            thread.join()


def values_of(attributes: Any) -> dict[str, Any]:
    """Return attributes as Python's values."""
    pairs: list[KeyValue] = list(attributes)
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return None if kind is None else getattr(value, kind)
