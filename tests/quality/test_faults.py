"""Faults of texts, solved by hand in English, German and scripts without case."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.quality.faults import TextFaults, fault_rates, find_faults
from pipeline.quality.lexicon import collect_words

LEXICON = frozenset(
    collect_words(
        [
            "the cook said that she had seen a cat and a dog in the garden with her boy to day",
            "it was not he who did come",
            "der Koch sagte dass er eine Katze und einen Hund im Garten sah komm mit mir das Haus war alt Maus die",
        ]
    )
)
NO_FAULTS = dict.fromkeys(
    ("invented_words", "lone_names", "joined_words", "doubled_words", "broken_quotes", "broken_sentences"), 0
)


def faults(text: str, prompt: str = "", finished: bool = True) -> dict[str, Any]:
    """The faults that are there."""
    found = asdict(find_faults(text, prompt=prompt, lexicon=LEXICON, finished=finished))
    return {name: count for name, count in found.items() if count and name not in ("words", "paragraphs")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cook had seen a cat.", {}),
        ("The cook had seen a stovember.", {"invented_words": 1}),
        ("The cook's cat had seen Oswin. Oswin's dog did not.", {}),
        ("The cook had seen Oswin.", {"invented_words": 1, "lone_names": 1}),
        ("Oswin had seen the cook.", {"invented_words": 1}),
        ("The stovember had seen the stovember.", {"invented_words": 2}),
        ("It was thecook and the catDog.", {"invented_words": 2, "joined_words": 2}),
        ("The the cook had\nhad seen. A cat. Cat and dog.", {"doubled_words": 2}),
        ("Had she seen the 3rd cat, J. and A.?", {}),
        ("", {"empty": True}),
        ("... 12 !", {"empty": True}),
        ("Der Koch sah eine Katze.", {}),
        ("Der Koch sah eine Bumbelmatz.", {"invented_words": 1, "lone_names": 1}),
        ("Der Koch sah die Katzemaus.", {"invented_words": 1, "lone_names": 1, "joined_words": 1}),
        ("Die die Katze sah.", {"doubled_words": 1}),
    ],
)
def test_words(text: str, expected: dict[str, Any]) -> None:
    assert faults(text) == expected


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ('"Come," said the cook, "it was he."', 0),
        ('"Come, said the cook.', 1),
        ('Come," said the cook.', 1),
        ('"Come, " said the cook.', 1),
        ('The cook" said "come.', 1),
        ('The dog was 7" in the garden.', 0),
        ("“Come,” said the cook.", 0),
        ("“Come, said the cook.", 1),
        ("Come,” said the cook.", 1),
        ("“Come,“ said the cook.", 1),
        ("„Komm“, sagte der Koch. »Komm mit«, sagte er.", 0),
        ("„Komm, sagte der Koch.", 1),
        ('„Komm", sagte der Koch.', 0),
        ("«\u00a0Komm\u00a0», sagte er. ”Komm”, sagte er.", 0),
        ("“The cook said, «come» and „come“,” said he.", 0),
        # A quotation of three paragraphs: each opens it again, only the last closes it.
        ('"The cook had seen a cat.\n\n"It was not the dog.\n\n"He did come," said the boy.', 0),
        ('"The cook had seen a cat.\n\n"It was not the dog.\n\nHe did come.', 1),
        ("“The cook had seen a cat.\n\n“It was not the dog.\n\nHe did come.”", 2),
        ("# The cook\n\nA cat.\n\nA dog said: “Come.\n\nA boy.", 1),
    ],
)
def test_quotations(text: str, broken: int) -> None:
    assert faults(text).get("broken_quotes", 0) == broken


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("# The cook and the cat\nShe had seen it.", 0),
        ("She had seen it", 1),
        ("She had seen the\n\nA dog.", 1),
        ('She said: "Come!"\n\n(She did.)\n\n"Who did…"\n\n_It was he._', 0),
        ('She said:\n\n"Come."', 0),
        ("She said:", 1),
        ('"It was not—"\n\n"It was."', 0),
        ("She had seen a cat. the dog was not in the garden.", 1),
        ("She had seen a cat! the dog", 2),
        ('"Had she?" the cook said. "Come!" said he.', 0),
        ("It was a cat... and a dog, etc. and mr. a. in it.", 0),
        ("She had seen:\n\n- a cat\n\n- a dog\n\n* * *\n\nIT WAS HE\n\nIt was.", 0),
        ("It was not the cat.\n        -- The cook", 0),
        ("It was not the cat.\n        -- The cook\n(The cook's garden)", 0),
        ("It was not the cat\n        -- The cook", 1),
        ("Der Koch sah eine Katze. die Maus war alt.", 1),
        ("„Komm mit!“, sagte er. »Komm!« sagte der Koch.", 0),
    ],
)
def test_sentences(text: str, broken: int) -> None:
    assert faults(text).get("broken_sentences", 0) == broken


@pytest.mark.parametrize(
    ("prompt", "text", "words", "expected"),
    [
        ("The co", "ok had seen a cat.", 5, {}),
        ("The co", "ck had seen a cat.", 5, {"invented_words": 1}),
        ("Oswin had", " seen Oswin", 2, {"broken_sentences": 1}),
        ("The cook had", " had a cat.", 3, {"doubled_words": 1}),
        ('"Come', ', said the cook.', 3, {"broken_quotes": 1}),
        ('"Come', '," said the cook.', 3, {}),
        # What is wrong in the prompt alone is nobody's fault.
        ('"Stovember the the\n\n', "The cook.", 2, {}),
    ],
)  # fmt: skip
def test_a_text_is_judged_with_its_prompt(prompt: str, text: str, words: int, expected: dict[str, Any]) -> None:
    assert faults(text, prompt) == expected
    assert find_faults(text, prompt=prompt, lexicon=LEXICON, finished=True).words == words


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ('The cook said: "The c', 4, {}),
        ("The cook said: don'", 3, {}),
        ("The cook said: caf\N{REPLACEMENT CHARACTER}", 3, {}),
        ("The stovember, ", 2, {"invented_words": 1}),
        ("The cook said it\n\n", 4, {"broken_sentences": 1}),
        ('"The cook\n\nShe did', 3, {"broken_quotes": 1, "broken_sentences": 1}),
        ('Come," said the cook', 3, {"broken_quotes": 1, "invented_words": 0}),
        ("The", 0, {}),
        ("...", 0, {"empty": True}),
    ],
)
def test_what_is_cut_is_not_judged(text: str, words: int, expected: dict[str, Any]) -> None:
    assert faults(text, finished=False) == {name: count for name, count in expected.items() if count}
    assert find_faults(text, prompt="", lexicon=LEXICON, finished=False).words == words


def test_a_script_without_case() -> None:
    lexicon = frozenset(collect_words(["राजा ने बिल्ली देखी।"]))
    found = find_faults("राजा ने कुत्ता देखी। मीरा ने मीरा मीरा देखी", prompt="", lexicon=lexicon, finished=True)
    assert asdict(found) == NO_FAULTS | {
        "words": 9,
        "invented_words": 1,
        "doubled_words": 1,
        "paragraphs": 1,
        "broken_sentences": 1,
        "empty": False,
    }


PIECES = st.lists(
    st.sampled_from(["The", "the", "cook", "thecook", "Oswin", "stov", ".", "!", '"', "“", "”", "„", "\n\n", " ", ","])
).map("".join)


@given(PIECES, PIECES, st.booleans())
def test_counts_never_exceed_what_is_counted(prompt: str, text: str, finished: bool) -> None:
    found = find_faults(text, prompt=prompt, lexicon=LEXICON, finished=finished)
    assert max(found.invented_words, found.doubled_words) <= found.words
    assert max(found.lone_names, found.joined_words) <= found.words
    assert found.joined_words <= found.invented_words
    assert found.broken_quotes <= found.paragraphs
    assert found.broken_sentences <= found.paragraphs + found.words
    assert not (found.empty and found.words)


@given(PIECES, PIECES)
def test_faults_of_two_parts_are_those_of_the_whole(first: str, second: str) -> None:
    first += ".\n\n"
    whole = find_faults(first + second, prompt="", lexicon=LEXICON, finished=True)
    parts = [
        find_faults(first, prompt="", lexicon=LEXICON, finished=True),
        find_faults(second, prompt=first, lexicon=LEXICON, finished=True),
    ]
    for name in ("words", "paragraphs", "doubled_words"):
        assert getattr(whole, name) == sum(getattr(part, name) for part in parts)
    # A name that comes again later is a name from its first time on, and a quotation may be opened again.
    assert whole.invented_words <= sum(part.invented_words for part in parts)
    assert whole.broken_quotes <= sum(part.broken_quotes for part in parts)


@given(PIECES, PIECES)
def test_a_longer_lexicon_finds_fewer_inventions(prompt: str, text: str) -> None:
    few, many = (
        find_faults(text, prompt=prompt, lexicon=lexicon, finished=True) for lexicon in (LEXICON, LEXICON | {"stov"})
    )
    assert many.invented_words <= few.invented_words
    assert replace(many, invented_words=0, joined_words=0, lone_names=0) == replace(
        few, invented_words=0, joined_words=0, lone_names=0
    )


def test_rates_of_a_set() -> None:
    first = find_faults("The stovember had the the cat", prompt="", lexicon=LEXICON, finished=True)
    second = find_faults("", prompt="", lexicon=LEXICON, finished=True)
    assert asdict(fault_rates([first, second])) == pytest.approx(
        {
            "invented_words": 1000 / 6,
            "lone_names": 0,
            "joined_words": 0,
            "doubled_words": 1000 / 6,
            "broken_quotes": 0,
            "broken_sentences": 1,
            "empty_share": 0.5,
        }
    )
    assert fault_rates([]).empty_share == 0


def test_every_fault_has_a_rate() -> None:
    rates = asdict(fault_rates([]))
    counted = set(asdict(TextFaults(words=0, paragraphs=0, empty=True, **NO_FAULTS)))
    assert set(rates) == counted - {"words", "paragraphs", "empty"} | {"empty_share"}
