"""The options of the server with their defaults, which are here alone; cheap to import, so that `--help` is fast."""

import os
from dataclasses import dataclass

from pipeline.errors import UserError

KEYS_VARIABLE = "PIPELINE_API_KEYS"
BODY_BYTES = 2 * 2**20
"""The largest body of a request: room for a hundred prompts of GPT-2's context in token ids."""


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = 8000


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


def keys_from_environment() -> tuple[str, ...]:
    """Return the keys in `PIPELINE_API_KEYS`. Raises `UserError` for one that no header can carry."""
    keys = tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    if any(not key.isascii() or not key.isprintable() for key in keys):
        raise UserError(f"{KEYS_VARIABLE}: a key has characters that no header can carry; use letters and digits")
    return keys
