"""Progress bars appear on terminals only."""

import io
import sys

import pytest

from pipeline.progress import progress

each_stream = pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "file"])


class Stream(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@each_stream
def test_a_bar_goes_over_its_items(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress([3, 1, 2], description="reading", unit="file")) == [3, 1, 2]
    assert ("reading: 100%" in stream.getvalue() and "3/3" in stream.getvalue()) == is_terminal
    assert is_terminal or not stream.getvalue()


@each_stream
def test_a_bar_counts_what_it_is_given(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(description="trials", total=10, initial=4) as bar:
        bar.update(6)
    assert ("10/10" in stream.getvalue()) == is_terminal
