"""Documents of each split become token arrays and a report."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file, write_json, write_jsonl
from pipeline.stages.tokenize import SPLITS, tokenize
from pipeline.tokens import END_OF_TEXT, TOKENIZER_FILE, load_tokens, tokenizer_sha256

TEXTS = {"train": ["one two", "two one two one", "one"], "validation": ["two"], "test": []}
ONE, TWO, END = 0, 1, 2


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """The folder of the prepare stage."""
    folder = tmp_path / "prepare"
    for split, texts in TEXTS.items():
        write_jsonl(folder / f"{split}.jsonl", [{"id": str(i), "title": None, "text": t} for i, t in enumerate(texts)])
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The files of the base stage that `tokenize` reads: a tokenizer of words, and a context of 5."""
    folder = tmp_path / "base"
    write_json(folder / "config.json", {"n_positions": 5})
    tokenizer = Tokenizer(models.WordLevel(vocab={"one": ONE, "two": TWO, END_OF_TEXT: END}, unk_token="one"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / TOKENIZER_FILE))
    return folder


def test_every_split_becomes_arrays(documents: Path, base: Path, tmp_path: Path) -> None:
    tokenize(documents, base, tmp_path / "out")
    arrays = {split: load_tokens(tmp_path / "out" / split, tokenizer_sha256(base)) for split in SPLITS}
    assert arrays["train"].tokens.tolist() == [END, ONE, TWO, END, TWO, ONE, TWO, ONE, END, ONE, END]
    assert arrays["validation"].tokens.tolist() == [END, TWO, END]
    assert arrays["test"].tokens.tolist() == [END]
    assert {split: len(arrays[split]) for split in SPLITS} == {"train": 3, "validation": 1, "test": 0}


def test_report_counts_each_split(documents: Path, base: Path, tmp_path: Path) -> None:
    tokenize(documents, base, tmp_path / "out")
    assert read_json(tmp_path / "out" / "report.json") == {
        "train": {
            "documents": 3,
            "tokens": 11,
            "bytes": 25,
            "bytes_per_token": 25 / 7,
            "longest_document_tokens": 6,
            "documents_longer_than_context": 1,
        },
        "validation": {
            "documents": 1,
            "tokens": 3,
            "bytes": 3,
            "bytes_per_token": 3.0,
            "longest_document_tokens": 3,
            "documents_longer_than_context": 0,
        },
        "test": {
            "documents": 0,
            "tokens": 1,
            "bytes": 0,
            "bytes_per_token": None,
            "longest_document_tokens": 0,
            "documents_longer_than_context": 0,
        },
        "context_length": 5,
        "tokenizer_sha256": tokenizer_sha256(base),
        "special_tokens": {},
    }


def test_the_same_documents_give_the_same_bytes(documents: Path, base: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        tokenize(documents, base, tmp_path / out)
    one, two = (
        {file.relative_to(tmp_path / out): sha256_file(file) for file in (tmp_path / out).rglob("*") if file.is_file()}
        for out in ("one", "two")
    )
    assert one == two
    assert len(one) == 10


def test_special_tokens_are_counted_over_all_splits(
    documents: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, text in {"train": "one <|two|> <|two|>", "test": "<|two|> <|three|>"}.items():
        write_jsonl(documents / f"{split}.jsonl", [{"id": "0", "title": None, "text": text}])
    tokenizer = Tokenizer.from_file(str(base / TOKENIZER_FILE))
    tokenizer.add_special_tokens(["<|two|>"])
    tokenizer.save(str(base / TOKENIZER_FILE))
    tokenize(documents, base, tmp_path / "out")
    arrays = load_tokens(tmp_path / "out" / "train", tokenizer_sha256(base))
    token = tokenizer.token_to_id("<|two|>")
    assert arrays.tokens.tolist() == [END, ONE, token, token, END]
    assert read_json(tmp_path / "out" / "report.json")["special_tokens"] == {
        "<|three|>": {"count": 1, "read_as": "text"},
        "<|two|>": {"count": 3, "read_as": "token"},
    }
    assert "special tokens: <|two|> 3 (" in capsys.readouterr().out


def test_a_missing_split_leaves_nothing(documents: Path, base: Path, tmp_path: Path) -> None:
    (documents / "validation.jsonl").unlink()
    with pytest.raises(UserError, match=r"validation\.jsonl: no such file; make it with dvc repro prepare"):
        tokenize(documents, base, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_base_without_tokenizer_is_an_error(documents: Path, base: Path, tmp_path: Path) -> None:
    (base / TOKENIZER_FILE).unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        tokenize(documents, base, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
