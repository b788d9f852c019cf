"""Whether a continuation has fallen into a loop, told as it grows.

`pipeline.quality.repetition.is_looping` defines what a loop is.
"""

from collections import defaultdict, deque


class Loops:
    """A text that grows, and how long it has had each period.

    Its end has the period n for as many tokens as are each the one n before. It is a run of n tokens, k times in a row,
    when it has had that period for n * (k - 1) tokens. A token goes on only with periods at whose distance it stood
    before: a step takes as many operations as the token occurs among the latest `longest`, in prose about one.
    """

    def __init__(self, longest: int, repeats: int, shortest: int = 1) -> None:
        """The loops that count are of runs from `shortest` to `longest` tokens, `repeats` times in a row."""
        self._longest, self._repeats, self._shortest = longest, repeats, shortest
        self._tokens = 0
        self._places: defaultdict[int, deque[int]] = defaultdict(deque)
        self._lengths: dict[int, int] = {}

    def append(self, token_id: int) -> bool:
        """Go on with this token; whether the text then ends in a loop."""
        places = self._places[token_id]
        while places and self._tokens - places[0] > self._longest:
            places.popleft()
        periods = (self._tokens - place for place in places)
        self._lengths = {n: self._lengths.get(n, 0) + 1 for n in periods if n >= self._shortest}
        places.append(self._tokens)
        self._tokens += 1
        return any(length >= n * (self._repeats - 1) for n, length in self._lengths.items())
