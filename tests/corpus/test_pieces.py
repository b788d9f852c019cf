"""Running text is cut into pieces at places that depend on its content."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.pieces import cut_pieces, ends_sentence
from pipeline.corpus.words import count_words


def book(paragraphs: int, words: int = 20) -> list[str]:
    numbers = random.Random(7)
    return [" ".join(f"w{numbers.randrange(5000)}" for _ in range(words)) + "." for _ in range(paragraphs)]


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        ("It rang.", True),
        ('"Go!"', True),
        ("(so?)  ", True),
        ("the old", False),
        ("so:", False),
        ("好。」", True),
        ("है।", True),
        ("好，", False),
    ],
)
def test_sentence_end_may_be_followed_by_quotes_and_brackets(line: str, ends: bool) -> None:
    assert ends_sentence(line) is ends


def test_pieces_hold_whole_paragraphs_of_about_the_words_asked() -> None:
    paragraphs = book(400)
    pieces = cut_pieces("\n\n".join(paragraphs), 200)
    assert [paragraph for piece in pieces for paragraph in piece.split("\n\n")] == paragraphs
    assert all(100 <= len(piece.split()) <= 300 for piece in pieces)


def test_short_text_is_one_piece() -> None:
    assert cut_pieces("One.\n\nTwo.", 300) == ["One.\n\nTwo."]
    assert cut_pieces("", 300) == [""]


def test_paragraph_added_in_front_leaves_the_pieces_behind_it() -> None:
    paragraphs = book(400)
    before = cut_pieces("\n\n".join(paragraphs), 200)
    after = cut_pieces("\n\n".join(["A new preface of six words.", *paragraphs]), 200)
    assert len(set(before) - set(after)) <= 8


def test_piece_does_not_end_with_a_heading() -> None:
    text = "\n\n".join(f"# Chapter {number}\n\n{paragraph}" for number, paragraph in enumerate(book(60)))
    assert all("# " not in piece.split("\n\n")[-1] for piece in cut_pieces(text, 50))


@pytest.mark.parametrize(
    ("separator", "ending"),
    [("\n", "."), (" ", "."), (" ", "")],
    ids=["at line ends", "at sentence ends", "at spaces"],
)
def test_huge_paragraph_is_cut_inside(separator: str, ending: str) -> None:
    sentences = [sentence.removesuffix(".") + ending for sentence in book(100, words=10)]
    pieces = cut_pieces(separator.join(sentences), 100)
    assert separator.join(pieces) == separator.join(sentences)
    assert all(50 <= len(piece.split()) <= 150 for piece in pieces)
    assert not ending or all(piece.endswith(".") for piece in pieces)


def test_paragraph_up_to_twice_the_words_stays_whole() -> None:
    paragraphs = book(10, words=200)
    assert cut_pieces("\n\n".join(paragraphs), 100) == paragraphs


def unspaced_book(letters: str, sentences: int, ending: str) -> list[str]:
    numbers = random.Random(7)
    return ["".join(numbers.choices(letters, k=numbers.randrange(8, 30))) + ending for _ in range(sentences)]


@pytest.mark.parametrize("ending", ["。", "！」", "。”"])
def test_huge_paragraph_without_spaces_is_cut_at_sentence_ends(ending: str) -> None:
    text = "".join(unspaced_book("我们去了北京天气很好", 200, ending))
    pieces = cut_pieces(text, 100)
    assert "".join(pieces) == text
    assert all(50 <= count_words(piece) <= 150 for piece in pieces)
    assert all(piece.endswith(ending) for piece in pieces)


@pytest.mark.parametrize(
    "letters", ["我们去了北京", "กขคงจ", "កខគឃង", "ကခဂဃင"], ids=["Han", "Thai", "Khmer", "Myanmar"]
)
def test_huge_sentence_without_spaces_is_cut_between_words(letters: str) -> None:
    text = "".join(unspaced_book(letters, 200, ""))
    pieces = cut_pieces(text, 100)
    assert "".join(pieces) == text
    assert all(50 <= count_words(piece) <= 150 for piece in pieces)


def test_paragraphs_without_spaces_are_cut_as_others() -> None:
    paragraphs = unspaced_book("我们去了北京天气很好", 200, "。")
    pieces = cut_pieces("\n\n".join(paragraphs), 100)
    assert [paragraph for piece in pieces for paragraph in piece.split("\n\n")] == paragraphs
    assert all(50 <= count_words(piece) <= 150 for piece in pieces)


@given(st.text(alphabet="我กิ。「」 a\n", max_size=200), st.integers(1, 9))
def test_no_character_but_space_is_lost(text: str, piece_words: int) -> None:
    assert "".join("".join(cut_pieces(text, piece_words)).split()) == "".join(text.split())


@given(st.text(alphabet="ab .\n#", max_size=400), st.integers(1, 20))
def test_no_word_is_lost(text: str, piece_words: int) -> None:
    assert " ".join(cut_pieces(text, piece_words)).split() == text.split()
