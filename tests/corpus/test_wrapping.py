"""Wrapped prose is joined; verse, lists and headings keep their lines."""

import textwrap
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.wrapping import MIN_BREAKS, find_breaks, find_wrap, join_wrapped

PROSE = (
    "The old clock in the tower had been slow for sixty years, and nobody in the town minded, since everybody knew by "
    "how much. Bakers set their ovens by it, ferries left by it, and children came home by it, late and hungry."
)
VERSE = (
    "Full fathom five thy father lies;\nOf his bones are coral made;\nThose are pearls that were his eyes:\n"
    "Nothing of him that doth fade,\nBut doth suffer a sea-change\nInto something rich and strange."
)
WRAPPED = textwrap.fill(PROSE, 72, break_on_hyphens=False)


def wrap_of(text: str) -> int | None:
    return find_wrap(Counter(find_breaks(text)))


def test_breaks_are_those_inside_paragraphs() -> None:
    assert list(find_breaks("# Title\none two\nthree four\n\nfive\n- six\n- seven\nnine")) == [(7, 5), (7, 4)]


def test_fixed_wrap_is_found_and_verse_in_the_file_does_not_hide_it() -> None:
    assert wrap_of("\n\n".join([WRAPPED] * 8 + [VERSE])) in (71, 72)  # both explain every break of the prose


@pytest.mark.parametrize(
    "text",
    [
        "\n\n".join([VERSE] * 20),
        "\n\n".join([PROSE] * 20),
        "\n".join(f"{number} short line" for number in range(40)),
        "\n\n".join([WRAPPED] * (MIN_BREAKS // WRAPPED.count("\n") - 1)),
        "",
    ],
    ids=["verse", "one line a paragraph", "list", "too little evidence", "nothing"],
)
def test_no_wrap_is_found_where_there_is_none(text: str) -> None:
    assert wrap_of(text) is None


def test_prose_is_joined_and_verse_in_a_wrapped_book_keeps_its_lines() -> None:
    assert join_wrapped(f"{WRAPPED}\n\n{VERSE}", 72) == (f"{PROSE}\n\n{VERSE}", WRAPPED.count("\n"))


def test_headings_and_list_items_keep_their_lines() -> None:
    text = f"# The Slow Clock\n{WRAPPED}\n- {WRAPPED}"
    assert join_wrapped(text, 72)[0] == f"# The Slow Clock\n{PROSE}\n- {PROSE}"


@pytest.mark.parametrize(
    ("end", "joint"),
    [("grand-", ""), ("word—", ""), ("word--", ""), ("word -", " "), ("word --", " "), ("word", " ")],
)
def test_hyphen_at_a_line_end_stays_and_joins_without_a_space(end: str, joint: str) -> None:
    line = "x" * (60 - len(end)) + " " + end
    assert join_wrapped(f"{line}\nfathers came.", 61)[0] == f"{line}{joint}fathers came."


@given(st.lists(st.text(alphabet="abcdefg", min_size=1, max_size=12), min_size=60), st.integers(50, 120))
def test_joining_undoes_textwrap(words: list[str], columns: int) -> None:
    text = " ".join(words)
    wrapped = textwrap.fill(text, columns)
    assert join_wrapped(wrapped, columns)[0] == text
