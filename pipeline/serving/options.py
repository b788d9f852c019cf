"""What can be set of a server. The defaults are here alone; importing this is cheap, so that `--help` can show them."""

from dataclasses import dataclass

BODY_BYTES = 2 * 2**20
"""The largest body of a request: room for a hundred prompts of GPT-2's context in token ids."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int | None = None
    """The longest continuation, in tokens; None for what the context holds."""
    timeout_s: float = 300.0
    """The longest time from a request's arrival to its end."""
    body_bytes: int = BODY_BYTES
