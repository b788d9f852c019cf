"""Whether texts keep a form."""

import re
from collections.abc import Sequence


def share_matching(texts: Sequence[str], pattern: re.Pattern[str]) -> float:
    """Share of the texts in which `pattern` is found. 0 where there is no text."""
    return sum(pattern.search(text) is not None for text in texts) / len(texts) if texts else 0.0
