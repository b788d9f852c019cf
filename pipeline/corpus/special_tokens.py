"""Count the names of special tokens in texts: those that the tokenizer has, and what only looks like one."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

from pipeline.tokens import END_OF_TEXT

_LOOKALIKE = r"<\|[\w.:/-]{1,40}\|>"
_NAME = re.compile(r"<\S*>|\[\S*\]")
"""The usual form of a special token's name. Other tokens that are added to tokenizers are words, or runs of spaces."""
_MAX_NAMES = 5
"""The most names in a line of the summary."""


class SpecialTokenCounts:
    """How often texts name each special token of a tokenizer, which is as `load_tokenizer` returns it.

    A name such as `<|user|>` that the tokenizer lacks is counted as well: the text was probably written for another
    model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        # What `load_tokenizer` leaves marked as special is ordinary characters in a text.
        self._known = {
            token.content: not token.special for token in added if token.special or _NAME.fullmatch(token.content)
        }
        self._counts = Counter[str]()
        names = sorted(map(re.escape, self._known), key=len, reverse=True)  # of two that match, the longer one
        self._pattern = re.compile("|".join([*names, _LOOKALIKE]))

    def count(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield the texts unchanged, counting the names in them."""
        for text in texts:
            self._counts.update(self._pattern.findall(text))
            yield text

    def describe(self) -> list[str]:
        """Return a line for the names that were read as tokens, one for those read as text, and one for the others."""
        tokens = {name: count for name, count in self._counts.items() if self._known.get(name)}
        texts = {name: count for name, count in self._counts.items() if self._known.get(name) is False}
        texts.pop(END_OF_TEXT, None)  # no parameter makes it a token
        unknown = {name: count for name, count in self._counts.items() if name not in self._known}
        lines = []
        if tokens:
            lines.append(f"special tokens: {_list(tokens)} (base.split_special_tokens: true reads them as text)")
        if texts:
            lines.append(f"special tokens read as text: {_list(texts)} (base.split_special_tokens: false: as tokens)")
        if unknown:
            lines.append(
                f"read as text: {_list(unknown)}; the base has no such tokens; add them to its tokenizer, or remove "
                "the names from the text"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the entry for report.json."""
        return {
            name: {"count": count, "read_as": "token" if self._known.get(name) else "text"}
            for name, count in sorted(self._counts.items())
        }


def _list(counts: dict[str, int]) -> str:
    most = Counter(counts).most_common(_MAX_NAMES)
    names = ", ".join(f"{name} {count:,}" for name, count in most)
    return names + (f" and {len(counts) - _MAX_NAMES} more" if len(counts) > _MAX_NAMES else "")
