"""Words of texts in several scripts, and the lexicon that knows them."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.quality.lexicon import collect_words, core, fold, is_known, load_lexicon, words_of, write_lexicon

TEXTS = st.text(st.sampled_from("abÄßéöi'’.\"“„»«! \n1²_-#न्मकी好ら"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cook's 3rd spoon, don’t!", ["The", "cook's", "spoon", "don’t"]),
        ("'tis the boys' _own_ well-known x2 1990s ½", ["tis", "the", "boys", "own", "well", "known"]),
        ("Füße, Straßen und O’Brien", ["Füße", "Straßen", "und", "O’Brien"]),
        ("cafe\u0301 noir", ["cafe\u0301", "noir"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
        ("Кот съел мышь.", ["Кот", "съел", "мышь"]),
        ("好的abc文", ["好", "的", "abc", "文"]),
        ("... -- 12", []),
    ],
)
def test_words_are_runs_of_letters(text: str, expected: list[str]) -> None:
    assert [word.text for word in words_of(text)] == expected


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("He met Tom. Then Mr. Plumb left! So he did.", "He Then So"),
        ('He said, "Come in," Tom said.', "He Come"),
        ("Er sagte: „Komm“, und ging. Tom blieb.", "Er Komm Tom"),
        ("Il dit «\u00a0Viens\u00a0» et partit.", "Il Viens"),
        ("# A Pen for Tom\nThe pen\n\nA nib", "A Pen for Tom The A"),
        ("Go, J. Plumb... No", "Go No"),
    ],
)
def test_words_that_start_a_sentence(text: str, starts: str) -> None:
    assert [word.text for word in words_of(text) if word.starts_sentence] == starts.split()


@given(TEXTS)
def test_words_are_where_they_say(text: str) -> None:
    words = words_of(text)
    assert all(text[word.start : word.end] == word.text for word in words)
    assert all(before.end <= word.start for before, word in pairwise(words))


@given(TEXTS, TEXTS)
def test_words_of_two_texts_are_those_of_each(first: str, second: str) -> None:
    together = [word.text for word in words_of(first + "\n\n" + second)]
    assert together == [word.text for word in [*words_of(first), *words_of(second)]]


@given(st.lists(TEXTS), st.integers(1, 3))
def test_order_of_texts_does_not_matter(texts: list[str], count: int) -> None:
    found = collect_words(texts, count)
    assert found == collect_words(reversed(texts), count)
    assert found <= collect_words(texts)
    assert all(is_known(word.text, frozenset(collect_words(texts))) for text in texts for word in words_of(text))


def test_words_that_occur_often_enough() -> None:
    assert collect_words(["The cook saw", "the Cook’s cook"], 2) == {"the", "cook"}


@pytest.mark.parametrize(
    ("word", "known"),
    [
        ("Oswin's", True),
        ("OSWIN", True),
        ("l’oswin", True),
        ("J", True),
        ("j", False),
        ("don't", True),
        ("don’t", True),
        ("Marmarty's", False),
        ("stovember", False),
        ("cafe\u0301", True),
    ],
)
def test_known_words(word: str, known: bool) -> None:
    assert is_known(word, frozenset({"oswin", "don't", "café"})) is known


def test_the_core_of_a_word_is_its_longest_part() -> None:
    assert (core("Oswin’s"), core("d'Artagnan"), fold("Don’t"), fold("Straße")) == (
        "oswin",
        "artagnan",
        "don't",
        "strasse",
    )


def test_the_same_words_give_the_same_file(tmp_path: Path) -> None:
    for words in (["über", "a", "don't"], ["don't", "über", "a"]):
        write_lexicon(tmp_path, frozenset(words))
        assert (tmp_path / "lexicon.txt").read_bytes() == "a\ndon't\nüber\n".encode()
        assert load_lexicon(tmp_path) == set(words)
    write_lexicon(tmp_path, frozenset())
    assert load_lexicon(tmp_path) == load_lexicon(tmp_path / "nowhere") == frozenset()
