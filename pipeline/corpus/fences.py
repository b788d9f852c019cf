"""Find fenced code blocks and code spans as in Markdown (CommonMark 0.31, 4.5 and 6.1); other texts have them, too."""

import re
from collections.abc import Iterator

_FENCE = re.compile(r" {0,3}(?P<fence>`{3,}|~{3,})(?P<info>.*)")
_SPAN = re.compile(r"(?<!`)(?P<ticks>`{1,2})(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`)")


def follow_fence(fence: str, line: str) -> str:
    """Return the fence of the block that is open after a line; `fence` is that of the block before it, or empty."""
    found = _FENCE.match(line)
    if found is None:
        return fence
    info = found["info"].strip()
    if fence:
        return "" if found["fence"].startswith(fence) and not info else fence
    return "" if found["fence"].startswith("`") and "`" in info else found["fence"]


def split_fences(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text, and whether each is a fenced block; a block that is not closed is not one."""
    done = 0
    if "```" in text or "~~~" in text:
        block_start = position = 0
        fence = ""
        while position < len(text):
            end = text.find("\n", position) + 1 or len(text)
            fence_after = follow_fence(fence, text[position:end])
            if fence_after and not fence:
                block_start = position
            elif fence and not fence_after:
                yield text[done:block_start], False
                yield text[block_start:end], True
                done = end
            fence, position = fence_after, end
    yield text[done:], False


def split_code(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text, and whether each is code: a fenced block, or a span between backticks."""
    for part, is_block in split_fences(text):
        if is_block or "`" not in part:
            yield part, is_block
            continue
        done = 0
        for span in _SPAN.finditer(part):
            yield part[done : span.start()], False
            yield span.group(), True
            done = span.end()
        yield part[done:], False
