"""HTML tags become space where a document is HTML, and other angle brackets stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.markup import is_markup, strip_tags


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
    assert is_markup(marked)
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


@pytest.mark.parametrize(
    "text",
    [
        "An <em>open</em> door, and x < y",
        "<p>One.\n<p>Two.\n<p> Three.",
        "<ul>\n<li> one\n<li> two\n</ul>",
        "<font color=red>One",
        "one<br>two<br>three <3",
        "One <!-- seen by nobody --> two",
        "<html>\n<p> One\n<q> two",
        '<p class=MsoNormal>One<o:p></o:p></p><my-note level="2">two</my-note>',
        'He said, "<em>No</em>," and left',
        "<i>Thou art more lovely;\nmore temperate;</i>\nrough winds;",
        "<p>How to:</p>\n<pre>\nint f() {\n  return 1;\n}\n</pre>\n<p>That is all.</p>",
    ],
)
def test_html_is_recognized(text: str) -> None:
    assert is_markup(text)


@pytest.mark.parametrize(
    "text",
    [
        "<Mark> hello\n<q> hi\n<Map> hey\n<s> ho",
        "<s>[INST] Why does the lamp burn? [/INST] For the ships. </s>",
        "<q>Why does it burn?</q><a>For the ships.</a>",
        "<summary>It burns.</summary><label>positive</label>",
        "<story><title>The lamp</title>It burns.</story>",
        "<p> hello\n<li> hi\n<p> hey",
        "<Link> hello\n<Source> hi",
        "<Mark> make it <b>bold</b>\n<Ruby> no\n<q> yes\n<Mark> why",
        "[12:01] <anna> </sarcasm>\n[12:02] <b> hi",
        "List<Object> find(Map<String, List<b>> all)",
        "std::vector<b> items; if (x <a> y && a<b>(c)) return Option<object>(v);",
        "for (int i = 0; i < n; i++) cout << a[i];",
        "fn f<a>(x: &a str) -> Vec<Option<u8>>",
        "SELECT a FROM b WHERE c <> d AND e < f",
        "mail <anna@example.org>, see <https://example.org>",
        "a <b and c> d",
        "1 < 2 > 0, <>, <3",
        '#include <map>\nint main() {\n  puts("<div><p>" "</p></div>");\n}',
        'def f(x):\n    return f"<b>{x}</b>"\n\nprint("<p>Hi</p>")\n',
        "export function App() {\n  return (\n    <div className='x'>\n      <p>{text}</p>\n    </div>\n  );\n}",
        'const html = "<div class=\'x\'>" + name + "</div>"',
    ],
)
def test_other_angle_brackets_are_not_html(text: str) -> None:
    assert not is_markup(text)
