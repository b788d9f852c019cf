"""The process of the server: it loads, listens, finishes what runs when it is told to end, and ends."""

import logging
import socket
import threading
from pathlib import Path
from types import FrameType

import uvicorn

from pipeline.decoding import ModelDecoding
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError
from pipeline.serving.app import KEYS_VARIABLE, create_app, keys_from_environment
from pipeline.serving.metrics import Metrics
from pipeline.serving.options import Limits
from pipeline.serving.served import Served, source_of

LOOPBACK = ("127.0.0.1", "::1", "localhost")

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Says where it is, and tells load balancers that it ends as soon as it knows; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, served: Served) -> None:
        super().__init__(config)
        self._served = served

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"{address}/ is the playground, {address}/v1 the API, and {address}/docs tells of it", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._served.draining = True
        super().handle_exit(sig, frame)


def serve(
    model: str,
    decoding: ModelDecoding,
    *,
    host: str,
    port: int,
    provider: str,
    precision: str,
    threads: int | None,
    slots: int,
    max_queue: int,
    max_tokens: int | None,
    timeout_s: float,
    origins: tuple[str, ...],
    open_metrics: bool,
    mlflow_url: str,
) -> None:
    """Serve until a signal. `decoding` is that of an engine folder; a registered model brings its own.

    Raises `UserError` where the model will not do or an option is out of range, and where the engine died.
    """
    for name, value, least in (("--max-queue", max_queue, 0), ("--max-tokens", max_tokens or 1, 1)):
        if value < least:
            raise UserError(f"{name}: {value} is out of range, must be at least {least}")
    if timeout_s <= 0:
        raise UserError(f"--timeout-s: {timeout_s:g} is out of range, must be above 0")
    keys = keys_from_environment()
    if not keys and host not in LOOPBACK:
        logger.warning("--host %s: whoever reaches the port may ask; %s can name keys", host, KEYS_VARIABLE)
    metrics = Metrics()
    died = threading.Event()

    def on_death() -> None:
        died.set()
        server.should_exit = True

    def load(folder: Path) -> TextGenerator:
        return TextGenerator.load(folder, precision=precision, provider=provider, threads=threads, slots=slots)

    source = source_of(model, decoding, mlflow_url)
    served = Served(source, load, max_queue=max_queue, on_tokens=metrics.on_tokens, on_death=on_death)
    app = create_app(
        served,
        metrics,
        limits=Limits(max_tokens, timeout_s),
        keys=keys,
        origins=origins,
        open_metrics=open_metrics,
    )
    config = uvicorn.Config(app, host=host, port=port, access_log=False, log_level="warning", server_header=False)
    server = Server(config, served)
    with bound(host, port) as listener:
        # Nobody is answered before it is ready, and what keeps it from that is told in one line.
        served.start()
        server.run(sockets=[listener])
    if died.is_set():
        raise UserError("the engine ended by an error, which is shown above; start the server again, or report it")


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet. Raises `UserError` where that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"--port: {host} port {port} cannot be had ({error})") from error
    return listener
