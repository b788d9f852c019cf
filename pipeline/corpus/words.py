"""The words of a text, and their digest: texts with equal digests count as the same."""

import hashlib
import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def normalize_words(text: str) -> list[str]:
    """Return the runs of letters and digits in lower case, which do not depend on spacing, case and punctuation."""
    return _WORD.findall(text.lower())


def digest(words: Sequence[str]) -> bytes:
    """Return the SHA-256 of normalized words."""
    return hashlib.sha256(" ".join(words).encode()).digest()
