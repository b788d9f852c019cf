"""Detect a loop in a continuation as it grows. `pipeline.quality.repetition.is_looping` defines what a loop is."""

from collections import defaultdict, deque


class LoopDetector:
    """A growing text, and for how many tokens its end has had each period.

    The end has the period n while each token equals the one n before it. It is a run of n tokens, k times in a row,
    once it has had that period for n * (k - 1) tokens. A new token keeps a period only if the same token occurred at
    that distance. So a step takes as many operations as the token has occurrences among the latest `longest`, in prose
    about one.
    """

    def __init__(self, longest: int, repeats: int, shortest: int = 1) -> None:
        """Detect runs of `shortest` to `longest` tokens, `repeats` times in a row."""
        self._longest, self._repeats, self._shortest = longest, repeats, shortest
        self._tokens = 0
        self._places: defaultdict[int, deque[int]] = defaultdict(deque)
        self._lengths: dict[int, int] = {}

    def append(self, token_id: int) -> bool:
        """Append a token, and return whether the text then ends in a loop."""
        places = self._places[token_id]
        while places and self._tokens - places[0] > self._longest:
            places.popleft()
        periods = (self._tokens - place for place in places)
        self._lengths = {n: self._lengths.get(n, 0) + 1 for n in periods if n >= self._shortest}
        places.append(self._tokens)
        self._tokens += 1
        return any(length >= n * (self._repeats - 1) for n, length in self._lengths.items())
