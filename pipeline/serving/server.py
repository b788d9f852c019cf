"""The server's process: it loads a model, listens, and on a signal finishes what runs before it ends."""

import gc
import logging
import math
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from pipeline.decoding import ModelDecoding
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError
from pipeline.serving.app import create_app
from pipeline.serving.metrics import Metrics
from pipeline.serving.options import KEYS_VARIABLE, Access, Address, EngineOptions, Limits, Tracing
from pipeline.serving.served import Served, source_of

if TYPE_CHECKING:
    from pipeline.serving.traces import Traces

GRACE_S = 3
"""The time that the last answers have after the timeout of their requests."""
COLLECTED_AT_ONCE = (50_000, 50)
"""The number of new objects after which the garbage collector looks at them, and how often it does so before it looks
at those that stayed."""

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Prints its address, and reports not ready from the first signal on; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, served: Served, traces: "Traces | None") -> None:
        super().__init__(config)
        self._served = served
        self._traces = traces

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"{address}/ is the playground, {address}/v1 the API, and {address}/docs its description", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # Uvicorn ends the process by the same signal after this.
        if self._traces is not None and not self.force_exit:
            self._traces.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._served.draining = True
        # Uvicorn does so for SIGINT alone.
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


def serve(
    model: str,
    decoding: ModelDecoding | None,
    *,
    address: Address,
    engine: EngineOptions,
    limits: Limits,
    access: Access,
    mlflow_url: str,
    tracing: Tracing | None = None,
) -> None:
    """Serve until a signal. `decoding` is that of an engine folder; None for a registered model, which brings its own.

    Raises `UserError` if the model cannot be served or an option is out of range, and if the engine breaks.
    """
    for name, value, least in (
        ("--max-queue", engine.max_queue, 0),
        ("--max-slots-per-client", engine.slots_per_client, 1),
        ("--max-tokens", limits.max_tokens, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{name}: {value} is out of range, must be at least {least}")
    if limits.timeout_s <= 0:
        raise UserError(f"--timeout-s: {limits.timeout_s:g} is out of range, must be above 0")
    if not access.keys and not address.is_loopback:
        logger.warning(
            "--host %s: everybody who reaches the port is served; set keys in %s", address.host, KEYS_VARIABLE
        )
    metrics = Metrics()
    died = threading.Event()

    def on_death() -> None:
        died.set()
        server.should_exit = True

    def load(folder: Path, provider: str | None) -> TextGenerator:
        # A version that does not fit on the GPU beside the one that it replaces must not be served by the processor.
        return TextGenerator.load(
            folder,
            precision=engine.precision,
            provider=provider or engine.provider,
            threads=engine.threads,
            slots=engine.slots,
        )

    source = source_of(model, decoding, mlflow_url)
    served = Served(
        source,
        load,
        max_queue=engine.max_queue,
        slots_per_client=engine.slots_per_client,
        on_tokens=metrics.on_tokens,
        on_death=on_death,
    )
    checks_host = address.is_loopback and not access.keys
    traces = None if tracing is None else _traces(tracing)
    app = create_app(
        served, metrics, limits, access, root_path=address.root_path, checks_host=checks_host, traces=traces
    )
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        server_header=False,
        # By then every request has ended; only what a client does not read keeps its connection open.
        timeout_graceful_shutdown=math.ceil(limits.timeout_s) + GRACE_S,
    )
    server = Server(config, served, traces)
    with bind_socket(address) as listener:
        # Before the port is open: nobody is answered until the model is ready, and an error is one line.
        served.start()
        # What is loaded stays. If the collector looked at it, or at all of a body of many lists, again and again, each
        # such body would hold all other requests for a second.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECTED_AT_ONCE)
        server.run(sockets=[listener])
    if died.is_set():
        raise UserError("the engine ended with the error above; start the server again, or report it")


def _traces(tracing: Tracing) -> "Traces":
    from pipeline.serving.traces import Traces

    return Traces(tracing)


def bind_socket(address: Address) -> socket.socket:
    """Return a socket that has the address but does not listen yet. Raises `UserError` if it is not available."""
    host, port = address.host, address.port
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"--port: {host} port {port} is not available ({error})") from error
    return listener
