"""HTML tags become space, and other angle brackets stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.markup import strip_tags


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("<p>One.</p><p>Two.</p>", "\n\nOne.\n\n\n\nTwo.\n\n"),
        ("one<br>two<br/>three<BR />four", "one\ntwo\nthree\nfour"),
        ("an <em>open</em> <a href='x?a=1&amp;b=2' class=y>door</a>", "an open door"),
        ('<img src="a.png" alt="a > b">seen', "seen"),
        ("<input type=checkbox checked>ticked", "ticked"),
        ("a<!-- not\nseen -->b<script>if (a < b) x()</script>c<style type='t'>p{}</style>d", "abcd"),
        ("<!DOCTYPE html><html><body>text</body></html>", "\n\n\n\ntext\n\n\n\n"),
    ],
)
def test_tags_leave_what_they_mean(marked: str, plain: str) -> None:
    assert strip_tags(marked) == plain


@pytest.mark.parametrize(
    "text", ["a < b and c > d", "I <3 you", "dear <name>,", "a <b and c> d", "List<int>", "<>", "&lt;p&gt;", "x <p y"]
)
def test_what_is_no_tag_stays(text: str) -> None:
    assert strip_tags(text) == text


@given(st.text(alphabet="abp <>/=\"'&;!-\n"))
def test_only_text_with_angle_brackets_changes(text: str) -> None:
    stripped = strip_tags(text)
    assert stripped == text or ("<" in text and ">" in text)
