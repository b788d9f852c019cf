"""The options of the server with their defaults, which are here alone; cheap to import, so that `--help` is fast."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from pipeline.errors import UserError

KEYS_VARIABLE = "PIPELINE_API_KEYS"
OTLP_PREFIX = "OTEL_EXPORTER_OTLP_"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
"""OpenTelemetry's variables, of which the first one that is set counts."""
SERVICE_VARIABLE = "OTEL_SERVICE_NAME"
PROTOCOL = "http/protobuf"
BODY_BYTES = 2 * 2**20
"""The largest body of a request: room for a hundred prompts of GPT-2's context in token ids."""


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    root_path: str = ""
    """The path under which a proxy shows the server, such as `/llm`; empty for the root of a host."""

    def __post_init__(self) -> None:
        path = self.root_path.rstrip("/")
        if not re.fullmatch(r"(/[\w.~%-]+)*", path, re.ASCII):
            raise UserError(f"--root-path: {self.root_path!r} is not a path that starts with a slash, such as /llm")
        object.__setattr__(self, "root_path", path)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return _is_local(self.host) or (_is_address(self.host) and ip_address(self.host).is_loopback)


@dataclass(frozen=True)
class EngineOptions:
    """How the engine of a version is loaded, and how many continuations it takes."""

    provider: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    """The cores that one operator may use; None for all that a quota leaves."""
    slots: int = 8
    """The continuations that run at once."""
    max_queue: int = 64
    """The continuations that may wait."""
    slots_per_client: int | None = None
    """The slots that one client may hold, and with them the same share of the queue; None for all."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int | None = None
    """The longest continuation, in tokens; None for what the context holds."""
    timeout_s: float = 300.0
    """The longest time from a request's arrival to its end."""
    body_bytes: int = BODY_BYTES


@dataclass(frozen=True)
class Access:
    """Who may send requests."""

    keys: tuple[str, ...] = ()
    """The keys of which a client must send one; without any, everybody is served."""
    origins: tuple[str, ...] = ()
    """The origins of other sites whose pages may send requests."""
    open_metrics: bool = False
    """Whether /metrics needs no key."""
    hosts: tuple[str, ...] = ()
    """The names by which the server may be asked, besides those of the loopback address, if its host is checked."""

    def allows_host(self, header: str) -> bool:
        """Whether a server on a loopback address, to which no key is sent, may answer a request with this `Host`.

        A page of any site can be made to reach it under the site's own name, which its owner points to 127.0.0.1 once
        the page is loaded (DNS rebinding). Browsers then send that name; they send an address only if it was asked for.
        """
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        return _is_local(name) or _is_address(name) or name in self.hosts

    def __post_init__(self) -> None:
        object.__setattr__(self, "origins", tuple(normalize_origin(origin) for origin in self.origins))
        object.__setattr__(self, "hosts", tuple(host.lower() for host in self.hosts))


@dataclass(frozen=True)
class Tracing:
    """Where a span per request is sent, and what it shows."""

    mlflow_url: str | None = None
    """The MLflow server that takes traces; None for none."""
    collector_url: str | None = None
    """The collector of OTLP's variables, which also hold how it is reached; None for none."""
    has_texts: bool = False
    """Whether spans show prompts and continuations."""


def read_tracing(mlflow_url: str | None, *, has_texts: bool) -> Tracing | None:
    """Return what is traced: for `mlflow_url` if it is given, and if OpenTelemetry's variables name a collector.

    None if nothing is. Raises `UserError` if that contradicts itself, or if a variable asks for what is not supported.
    """
    collector_name, collector = _first_set(ENDPOINTS)
    if "otlp" not in (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(","):
        collector = None
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        if mlflow_url is not None:
            raise UserError("--trace: OTEL_SDK_DISABLED is true; unset it, or leave the option out")
        return None
    if mlflow_url is None and collector is None:
        if has_texts:
            raise UserError("--trace-texts: nothing is traced; add --trace, or set OTEL_EXPORTER_OTLP_ENDPOINT")
        return None
    if collector is not None:
        protocol_name, protocol = _first_set(PROTOCOLS)
        if protocol not in (None, PROTOCOL):
            raise UserError(f"{protocol_name}: {protocol} is not supported; set {PROTOCOL}, and its port, 4318")
        if not re.match(r"https?://[^/]", collector):
            raise UserError(f"{collector_name}: is not an address such as http://localhost:4318")
    return Tracing(mlflow_url, collector, has_texts)


def _first_set(names: Sequence[str]) -> tuple[str, str | None]:
    """Return the first variable that is set, with its value; an empty one is as good as unset."""
    return next(((name, value) for name in names if (value := os.environ.get(name))), (names[0], None))


def _is_local(name: str) -> bool:
    name = name.rstrip(".").lower()
    return name == "localhost" or name.endswith(".localhost")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def normalize_origin(text: str) -> str:
    """Return an origin as browsers spell it: in lower case, without a slash at the end or the scheme's own port.

    Raises `UserError` if it is not an origin, because no request would ever match it.
    """
    if text == "*":
        return text
    refusal = UserError(
        f"--cors-origin: {text!r} is not an origin; write scheme, host and port as in https://example.org:8443"
    )
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError as error:
        raise refusal from error
    host = f"[{host}]" if ":" in host else host
    rest = (parts.path.strip("/"), parts.query, parts.fragment, parts.username)
    if not parts.scheme or not re.fullmatch(r"[\w.-]+|\[[\da-f:.]+\]", host) or any(rest):
        raise refusal
    own_port = {"http": 80, "https": 443}.get(parts.scheme)
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, own_port) else "")


def keys_from_environment() -> tuple[str, ...]:
    """Return the keys in `PIPELINE_API_KEYS`. Raises `UserError` for one that no header can carry."""
    keys = tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    if any(not key.isascii() or not key.isprintable() for key in keys):
        raise UserError(f"{KEYS_VARIABLE}: a key has characters that no header can carry; use letters and digits")
    return keys
