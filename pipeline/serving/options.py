"""The options of the server with their defaults, which are here alone; cheap to import, so that `--help` is fast."""

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeline.errors import UserError

KEYS_VARIABLE = "PIPELINE_API_KEYS"
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


@dataclass(frozen=True)
class EngineOptions:
    """How the engine of a version is loaded, and how many continuations it takes."""

    provider: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    """The cores that one operator may use; None for all."""
    slots: int = 8
    """The continuations that run at once."""
    max_queue: int = 64
    """The continuations that may wait."""


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "origins", tuple(normalize_origin(origin) for origin in self.origins))


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
