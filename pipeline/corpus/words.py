"""The words of a text, and the digest by which texts count as the same."""

import hashlib
import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def normalize_words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: what remains equal when spacing, case and punctuation differ."""
    return _WORD.findall(text.lower())


def digest(words: Sequence[str]) -> bytes:
    """SHA-256 of normalized words."""
    return hashlib.sha256(" ".join(words).encode()).digest()
