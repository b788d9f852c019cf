"""Each repair of a text, alone and in their order."""

import re
import time
import unicodedata
from collections import Counter

import ftfy
import pytest
from ftfy.badness import BADNESS_RE
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus import cleaning
from pipeline.corpus.cleaning import (
    Repairs,
    clean,
    remove_notices,
    remove_page_marks,
    repair_characters,
    tidy_space,
)


def cleaned(text: str, *, straighten_quotes: bool = True) -> str:
    return clean(text, wrap_columns=None, straighten_quotes=straighten_quotes, strip_markup=True)[0]


@pytest.mark.parametrize(
    ("raw", "repaired"),
    [
        ("The Heronâ€™s â€œone wordâ€\x9d", 'The Heron\'s "one word"'),  # UTF-8 read as Windows-1252
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("a bell.\u200b It\u00a0rang\u2009twice\ufeff", "a bell. It rang twice"),
        ("soft\u00adhyphen \u202bleft", "softhyphen left"),
        ("bell\x07 and\x1b[31m red", "bell and red"),
        ("cafe\u0301", "café"),
        ("page\fbreak", "page\nbreak"),
        ("half \ud800 a pair", "half \ufffd a pair"),
    ],
)
def test_characters_are_repaired(raw: str, repaired: str) -> None:
    assert repair_characters(raw, straighten_quotes=True) == repaired


def test_joiners_stay_where_they_make_the_letter() -> None:
    kept = "👩\u200d🚀 می\u200cخواهم"
    assert repair_characters(kept + " a\u200db\u200c", straighten_quotes=True) == kept + " ab"


def test_joiners_and_spaces_without_width_stay_where_they_make_the_word() -> None:
    kept = "അവന്\u200d പോയി. ভারত্\u200d។ ភាសា\u200bខ្មែរ"
    assert repair_characters(kept + " a\u200bb \u200bក", straighten_quotes=True) == kept + " ab ក"


@pytest.mark.parametrize(("straighten", "text"), [(True, "\"It's\" 'so'"), (False, "“It’s” ‘so’")])
def test_curly_quotes_follow_the_parameter(straighten: bool, text: str) -> None:
    assert cleaned("“It’s” &lsquo;so&rsquo;", straighten_quotes=straighten) == text


# What ftfy's search for mojibake distinguishes, and what it does not.
ODD = "‘’“”–—…•éèßæøüÿÉÀØÖÃÂŒœſžЂвГСиўβΒά²×£€§°¯\xa0\xad\x9d\ufffdﬁ中ب´©'\"\u0301\u200b\u2028\x07\r\x0b\f"


@given(st.text(alphabet=ODD + " \n\taZ.9", max_size=40), st.booleans())
def test_characters_are_those_of_ftfy_line_by_line(text: str, straighten: bool) -> None:
    config = ftfy.TextFixerConfig(
        unescape_html=False, uncurl_quotes=straighten, fix_character_width=False, normalization="NFC", explain=False
    )
    lines = text.replace("\r\n", "\n").replace("\f", "\n").split("\n")
    fixed = "\n".join(ftfy.fix_text(line, config) for line in lines)
    expected = cleaning._ODD_SPACE.sub(" ", cleaning._INVISIBLE.sub("", fixed))
    assert repair_characters(text, straighten_quotes=straighten) == expected


def test_a_text_is_not_searched_for_mojibake_only_if_none_can_be_found() -> None:
    # All strings of three characters, one for each way in which the search tells characters apart; those of more than
    # three that it finds begin with two that are searched.
    classes = [re.compile(found) for found in re.findall(r"\[[^\]]+\]", BADNESS_RE.pattern)]
    sets = cleaning._QUIET, cleaning._ACCENTED, cleaning._CAPITAL, cleaning._LETTER, cleaning._SEARCHED
    classes += [re.compile(f"[{own}]") for own in sets]
    literals = {character for character in re.sub(r"\[[^\]]+\]", "", BADNESS_RE.pattern) if character > "\x7f"}
    kinds: dict[object, str] = {literal: literal for literal in literals}
    for character in map(chr, (*range(0xD800), *range(0xE000, 0x11000))):
        kinds.setdefault((*(found.match(character) is None for found in classes), character.isalnum()), character)
    alphabet = [kind for kind in kinds.values() if not may_be_broken(kind)]
    after = {first: [second for second in alphabet if not may_be_broken(first + second)] for first in alphabet}
    assert len(alphabet) > 50
    for first in alphabet:
        for second in after[first]:
            for third in after[second]:
                text = first + second + third
                assert may_be_broken(text) or not BADNESS_RE.search(text), ascii(text)


def may_be_broken(text: str) -> bool:
    by_odd_characters = not cleaning._is_sound(text, cleaning._find_odd(text))
    assert by_odd_characters or not cleaning._BROKEN_BEFORE_ASCII.search(text), ascii(text)
    return cleaning._BROKEN_BEFORE_ASCII.search(text) is not None or not unicodedata.is_normalized("NFC", text)


NOTICE_PARTS = ["produced", "Scanned", "transcrıber", "Tranſcriber", "tranſcribed", " ", "x", "é" * 20, "by", "\n"]


@given(st.lists(st.sampled_from(NOTICE_PARTS), max_size=12).map("".join))
def test_a_text_is_searched_for_notices_if_there_may_be_one(text: str) -> None:
    assert cleaning._may_have_notice(text) or not cleaning._NOTICE_HINT.search(text)


@given(st.lists(st.sampled_from([*"[](){}-—\n\t 1x", "p. ", "Page ", "PG", "vi", "of"]), max_size=12).map("".join))
def test_a_text_is_searched_for_page_marks_if_there_may_be_one(text: str) -> None:
    marks = len(cleaning._PAGE_MARK_LINE.findall(text))
    assert remove_page_marks(text, wrapped=False)[1] == marks


@given(st.text(alphabet=st.characters(min_codepoint=0x20, max_codepoint=0x7E)))
def test_ftfy_leaves_plain_ascii_as_it_is(line: str) -> None:
    config = ftfy.TextFixerConfig(unescape_html=False, explain=False)
    assert ftfy.fix_text(line, config) == line == repair_characters(line, straighten_quotes=True)


def test_entities_are_decoded_after_tags_and_once() -> None:
    assert cleaned("<p>Fish &amp; chips</p><p>&lt;p&gt; &amp;lt;</p>") == "Fish & chips\n\n<p> &lt;"


def test_entities_stay_in_code_and_chats_and_where_the_parameter_says_so() -> None:
    code = "if (x < y && z) {\n  // &amp; is &lt;here&gt;\n}"
    chat = "<anna> Fish &amp; chips"
    assert (cleaned(code), cleaned(chat)) == (code, chat)
    kept = "<p>Fish &amp; chips</p>"
    assert clean(kept, wrap_columns=None, straighten_quotes=True, strip_markup=False)[0] == kept
    assert cleaned("Fish &amp; chips at Marks & Sons &quot;here&quot;") == 'Fish & chips at Marks & Sons "here"'


def test_space_is_tidy() -> None:
    assert tidy_space("\n \na  \n\t\n \n\nb\n  c \n") == "a\n\nb\n  c"


@pytest.mark.parametrize(
    "run",
    [
        " ",
        "\t",
        "\u00a0",
        "\n",
        " \n",
        "[",
        "-",
        "<b ",
        "<b>",
        "<p>x</b>",
        "<!-- -->",
        "<!--",
        "<script>",
        "<pre>",
        "<!doctype ",
        "a<b:",
        "&",
        ".",
        "A ",
    ],
)
def test_long_runs_cost_linear_time(run: str) -> None:
    text = "Word" + run * 40_000 + "x"
    start_s = time.process_time()
    clean(text, wrap_columns=72, straighten_quotes=True, strip_markup=True)
    assert time.process_time() - start_s < 3  # where it took the square, runs of spaces took 18 seconds


@given(st.text(alphabet="a \t\n"))
def test_tidy_space_is_stable(text: str) -> None:
    assert tidy_space(tidy_space(text)) == tidy_space(text)


@pytest.mark.parametrize(
    "mark", ["[page 11]", "[Pg 12]", "[p. xiv]", "{12}", "{page 12}", "- 12 -", "— 12 —", "(p. 3)", "Page 3 of 10"]
)
def test_page_mark_on_its_own_line_goes(mark: str) -> None:
    assert remove_page_marks(f"One.\n\n{mark}\n\nTwo.", wrapped=False) == ("One.\n\nTwo.", 1)


@pytest.mark.parametrize(
    "line", ["12", "[12]", "[Illustration]", "[pill]", "See [page 12].", "XII", "{name}", "-12", "1 - 2 - 3"]
)
def test_what_may_be_text_is_no_page_mark(line: str) -> None:
    text = f"One.\n\n{line}\n\nTwo."
    assert remove_page_marks(text, wrapped=False) == (text, 0)


@pytest.mark.parametrize(
    ("torn", "wrapped", "mended"),
    [
        ("the old\n\n[page 3]\n\nman went.", False, "the old man went."),
        ("the old\n[page 3]\nman went.", False, "the old man went."),
        ("the well-\n\n[page 3]\n\nknown man.", False, "the well-known man."),
        ("a line\nthe old\n\n[page 3]\n\nman went.", False, "a line\nthe old\nman went."),
        ("the old\n\n[page 3]\n\nman went\non.", False, "the old\nman went\non."),
        ("the old\n\n[page 3]\n\nman went.", True, "the old\nman went."),
        ("the old.\n\n[page 3]\n\nman went.", False, "the old.\n\nman went."),
        ('"the old!"\n\n[page 3]\n\nman went.', False, '"the old!"\n\nman went.'),
        ("the old\n\n[page 3]\n\nMan went.", False, "the old\n\nMan went."),
        ("# The Old\n\n[page 3]\n\nman went.", False, "# The Old\n\nman went."),
        ("One.\n[page 3]\nTwo.", False, "One.\nTwo."),
        ("[page 2]\n\nOne.\n\n[page 3]\n{4}\n", False, "One."),
    ],
)
def test_paragraph_torn_by_a_page_mark_is_mended(torn: str, wrapped: bool, mended: str) -> None:
    assert remove_page_marks(torn, wrapped=wrapped)[0] == mended


@pytest.mark.parametrize(
    "notice",
    [
        "[Transcriber's Note: Spelling [sic] is kept.\n\nSo are dashes.]",
        "Transcriber’s Notes: Spelling is kept.",
        "Produced by A. Light, Linda Bowser, and David Widger",
        "Produced by Greg Weeks, Mary Meehan and the Online\nDistributed Proofreading Team at http://www.pgdp.net",
        "E-text prepared by Jane Roe",
    ],
)
def test_transcribers_notice_goes(notice: str) -> None:
    text, notices = remove_notices(f"One.\n\n{notice}\n\nTwo.")
    assert (tidy_space(text), notices) == ("One.\n\nTwo.", 1)


@pytest.mark.parametrize(
    "paragraph",
    [
        "Produced by the sun, the heat cracked every board in the yard.",
        "The transcriber's note lay on the table.",
        "She read what was produced by Anne's hand.",
        "[Enter a Transcriber]",
        "Produced by " + "A" * 60 + "!",
    ],
)
def test_what_may_be_text_is_no_notice(paragraph: str) -> None:
    assert remove_notices(paragraph) == (paragraph, 0)


@pytest.mark.parametrize(
    "text",
    [
        "# Lists\n\nWrite:\n\n```html\n<ul>\n<li>One &amp; two</li>\n</ul>\n```\n\nto make a list.",
        "Write `<em>x</em>` and ``<a href='x'>`y`</a>`` for stress.",
        "~~~\n<p>One</p>\n\n<br>\n~~~\nis a paragraph.",
    ],
)
def test_code_in_fences_and_backticks_stays(text: str) -> None:
    assert cleaned(text) == text
    marked = f"<p>See</p>\n\n{text}\n\n<b>there</b>"
    assert cleaned(marked) == f"See\n\n{text}\n\nthere"


def test_clean_counts_what_it_repaired() -> None:
    text = "Produced by Jane Roe\n\n<p>one&nbsp;two</p>\n\n[page 1]\n\nThree."
    # A tag is replaced by two line ends, an entity by its character. A notice leaves the blank lines around it.
    removed = {
        "markup": len("<p></p>") - 4 + len("&nbsp;") - 1,
        "repaired_characters": 0,
        "space": 2 + 2,
        "notices": len("Produced by Jane Roe\n\n"),
        "page_marks": len("[page 1]\n\n"),
        "line_breaks": 0,
    }
    expected = "one two\n\nThree.", Repairs(1, 1, 0, Counter(removed))
    assert clean(text, wrap_columns=None, straighten_quotes=True, strip_markup=True) == expected
