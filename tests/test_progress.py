"""Progress bars appear on terminals, and lines elsewhere if it takes long."""

import io
import re
import sys
import time

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


def test_elsewhere_a_long_bar_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(is_terminal=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("pipeline.progress.LINE_S", 0.05)
    with progress(description="cleaning", total=4_000_000, unit="character", unit_scale=True) as bar:
        for _ in range(4):
            time.sleep(0.06)
            bar.update(1_000_000)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"cleaning: {n}.00M of 4.00M character" for n in (1, 2, 3, 4)]
    assert re.fullmatch(r"cleaning: 2.00M of 4.00M character, [\d.]+M?character/s, \d\d:\d\d left", lines[1])
    assert "\r" not in stream.getvalue()
