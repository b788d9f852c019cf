"""The names of special tokens in texts are counted, by how they are read."""

import pytest
from tokenizers import AddedToken, Tokenizer, models

from pipeline.corpus.special_tokens import SpecialTokenCounts

TEXTS = ["<|user|> hi </s> the tide    and", "<|user|>> <|user|>> <|bot|> a <|b, c|> <| user |> <s>", "<|endoftext|>"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A tokenizer as `load_tokenizer` returns it: what is marked as special is ordinary characters in a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(["</s>", "<|endoftext|>"])
    tokenizer.add_tokens([AddedToken(name) for name in ("<|user|>", "<|user|>>", "[INST]", "tide", "    ")])
    return tokenizer


def test_names_are_counted_by_how_they_are_read(tokenizer: Tokenizer) -> None:
    counts = SpecialTokenCounts(tokenizer)
    assert list(counts.count(TEXTS)) == TEXTS
    assert counts.to_json() == {
        "</s>": {"count": 1, "read_as": "text"},
        "<|bot|>": {"count": 1, "read_as": "text"},
        "<|endoftext|>": {"count": 1, "read_as": "text"},
        "<|user|>": {"count": 1, "read_as": "token"},
        "<|user|>>": {"count": 2, "read_as": "token"},
    }
    assert counts.describe() == [
        "special tokens: <|user|>> 2, <|user|> 1 (base.split_special_tokens: true reads them as text)",
        "special tokens read as text: </s> 1 (base.split_special_tokens: false: as tokens)",
        "read as text: <|bot|> 1; the base has no such tokens; add them to its tokenizer, or remove the names from the "
        "text",
    ]


def test_texts_without_special_tokens_need_no_line(tokenizer: Tokenizer) -> None:
    counts = SpecialTokenCounts(tokenizer)
    assert list(counts.count(["a < b || c > d, <user>, <|>"])) == ["a < b || c > d, <user>, <|>"]
    assert counts.describe() == []
    assert counts.to_json() == {}


def test_a_line_names_the_most_frequent_ones() -> None:
    counts = SpecialTokenCounts(Tokenizer(models.BPE()))
    list(counts.count([f"<|speaker{number}|> " * (number + 1) for number in range(7)]))
    (line,) = counts.describe()
    assert line.startswith(
        "read as text: <|speaker6|> 7, <|speaker5|> 6, <|speaker4|> 5, <|speaker3|> 4, <|speaker2|> 3 and 2 more;"
    )
