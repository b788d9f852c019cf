"""Wrapped prose is joined; verse, lists and headings keep their lines."""

import random
import textwrap
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.wrapping import MIN_BREAKS, find_breaks, find_joint, find_wrap, join_wrapped

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


def test_paragraphs_without_blank_lines_between_them_stay_apart() -> None:
    """As in many e-books: only an indent, or a short last line, shows where a paragraph begins."""
    indented = textwrap.fill(PROSE, 72, break_on_hyphens=False, initial_indent="    ")
    assert join_wrapped(f"{indented}\n{indented}", 72)[0] == f"    {PROSE}\n    {PROSE}"
    assert join_wrapped(f"{WRAPPED}\n{WRAPPED}", 72)[0] == f"{PROSE}\n{PROSE}"
    chinese = "那座塔里的老钟六十年来一直走得很慢，镇上没有人在意，因为每个人都知道它慢了多少。面包师按它烤面包。"
    lines = "\n".join(("　　" + chinese)[start : start + 20] for start in range(0, len(chinese) + 2, 20))
    assert wrap_of("\n".join([lines] * 8)) is None  # 40 columns are verse
    wide = "\n".join(("　　" + chinese * 2)[start : start + 35] for start in range(0, 2 * len(chinese) + 2, 35))
    assert join_wrapped(f"{wide}\n{wide}", 70)[0] == f"　　{chinese * 2}\n　　{chinese * 2}"


def test_fenced_blocks_keep_their_lines() -> None:
    log = "\n".join(f"2026-01-02 03:04:05 service_{number} started with the usual options" for number in range(6))
    text = f"{WRAPPED}\n```\n{log}\n\n{log}\n```\n{WRAPPED}"
    assert join_wrapped(text, 72)[0] == f"{PROSE}\n```\n{log}\n\n{log}\n```\n{PROSE}"


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


def wrap_unspaced(text: str, columns: int) -> str:
    """Wrap after wide characters, but let no line begin with a mark."""
    lines = [""]
    for character, after in zip(text, [*text[1:], ""], strict=True):
        if 2 * len(lines[-1] + character + after * (after in "，。")) > columns and character not in "，。":
            lines.append("")
        lines[-1] += character
    return "\n".join(lines)


@pytest.mark.parametrize("columns", [60, 80])
def test_lines_without_spaces_are_joined_without_any(columns: int) -> None:
    numbers = random.Random(3)
    sentences = ["".join(numbers.choices("我们去了北京天气很好", k=numbers.randrange(3, 20))) + "，" for _ in range(60)]
    paragraphs = ["".join(sentences[start : start + 12]) for start in range(0, 60, 12)]
    wrapped = "\n\n".join(wrap_unspaced(paragraph, columns) for paragraph in paragraphs)
    found = wrap_of(wrapped)
    assert found is not None
    assert join_wrapped(wrapped, found)[0] == "\n\n".join(paragraphs)


@pytest.mark.parametrize(
    ("before", "after", "joint"),
    [
        ("我们", "去了", ""),
        ("我们，", "去了", ""),
        ("ภาษา", "ไทย", ""),
        ("我们", "Bob", " "),
        ("왔다", "갔다", " "),
        ("a", "b", " "),
    ],
)
def test_a_joint_is_a_space_where_the_script_writes_one(before: str, after: str, joint: str) -> None:
    assert find_joint(before, after) == joint


@pytest.mark.parametrize("nick", ["<anna> ", "<Mark> ", "[12:04] <q> ", "12:04:31 <b> "])
def test_lines_of_a_chat_stay_apart(nick: str) -> None:
    text = "\n".join(f"{nick}{'word ' * 9}{'x' * (number % 3)}y" for number in range(40))
    assert wrap_of(text) is None
    assert join_wrapped(text, 60) == (text, 0)
