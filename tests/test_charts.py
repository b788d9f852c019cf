"""Charts are the same bytes each time, and hold what a page needs."""

import re
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.charts import NARROW_INCHES, inline_chart, new_chart, save_chart


def chart() -> Figure:
    figure, axes = new_chart("Heights", "x", "y < z", NARROW_INCHES)
    axes.plot([1, 2], [3, 4], "o-")
    return figure


def test_the_same_chart_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_chart(chart(), tmp_path / name / "chart.svg")
    assert (tmp_path / "one" / "chart.svg").read_bytes() == (tmp_path / "two" / "chart.svg").read_bytes()
    assert inline_chart(chart(), "heights", "Heights") == inline_chart(chart(), "heights", "Heights")


def test_a_chart_in_a_page_brings_nothing_that_only_a_file_needs() -> None:
    inline = inline_chart(chart(), "heights", 'Heights of "a" & <b>')
    assert inline.startswith(
        '<svg role="img" aria-label="Heights of &quot;a&quot; &amp; &lt;b&gt;" viewBox="0 0 316.8 259.2">'
    )
    assert inline.endswith("</svg>")
    assert "http" not in inline
    assert ">y &lt; z</text>" in inline


def test_charts_of_a_page_share_no_id_and_refer_to_their_own() -> None:
    for name, other in (("one", "two"), ("two", "one")):
        inline = inline_chart(chart(), name, name)
        ids = set(re.findall(r'\bid="([^"]*)"', inline))
        referred = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', inline))
        assert {found for pair in referred for found in pair if found} <= ids
        assert not ids & set(re.findall(r'\bid="([^"]*)"', inline_chart(chart(), other, other)))
