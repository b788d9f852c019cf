"""The tokenizer as this project uses it, and the token arrays."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file, write_json
from pipeline.tokens import (
    END_OF_TEXT,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TokenArrays,
    end_of_text_id,
    load_tokenizer,
    load_tokens,
    prompt_ids,
    tokenizer_sha256,
    vocabulary_size,
    write_tokens,
)

END = 256
"""End-of-text, right after the bytes."""


def byte_tokenizer(special_tokens: tuple[str, ...] = (END_OF_TEXT,)) -> Tokenizer:
    """A token a byte, its id the place of the byte's character among GPT-2's 256, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(str(folder / TOKENIZER_FILE))
    return load_tokenizer(folder)


def store(folder: Path, texts: list[str], tokenizer: Tokenizer) -> TokenArrays:
    folder.mkdir(exist_ok=True)
    write_tokens(folder, texts, tokenizer, "digest")
    return load_tokens(folder, "digest")


def test_arrays_hold_end_of_text_around_every_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    arrays = store(tmp_path, ["ab", "", "é"], tokenizer)
    a, b = tokenizer.encode("ab").ids
    first, second = tokenizer.encode("é").ids
    assert arrays.tokens.tolist() == [END, a, b, END, END, first, second, END]
    assert arrays.bounds.tolist() == [0, 3, 4, 7]
    assert [arrays.document(index).tolist() for index in range(len(arrays))] == [
        [END, a, b, END],
        [END, END],
        [END, first, second, END],
    ]
    assert arrays.document_tokens().tolist() == [4, 2, 4]


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.just(END_OF_TEXT), max_size=20))
def test_every_text_comes_back_and_end_of_text_only_parts(
    texts: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    arrays = store(tmp_path_factory.mktemp("tokens"), texts, tokenizer)
    assert len(arrays) == len(texts)
    for index, text in enumerate(texts):
        document = arrays.document(index).tolist()
        assert document[0] == document[-1] == END
        assert END not in document[1:-1]
        assert tokenizer.decode(document[1:-1]) == text
    assert arrays.text_bytes == sum(len(text.encode()) for text in texts)
    assert arrays.document_tokens().tolist() == [len(text.encode()) + 2 for text in texts]


def test_meta_says_what_the_arrays_hold(tmp_path: Path, tokenizer: Tokenizer) -> None:
    arrays = store(tmp_path, ["ab", "é"], tokenizer)
    assert read_json(tmp_path / "meta.json") == {
        "tokenizer_sha256": "digest",
        "vocabulary_size": 257,
        "end_of_text_id": END,
        "documents": 2,
        "tokens": 7,
        "dtype": "uint16",
        "text_bytes": 4,
        "sha256": arrays.sha256,
    }


@pytest.mark.parametrize("batch_characters", [1, 7, 100])
def test_more_documents_than_a_batch_read_as_one_array(
    batch_characters: int, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tokens.BATCH_CHARACTERS", batch_characters)
    texts = [str(number) for number in range(101)]
    arrays = store(tmp_path, texts, tokenizer)
    assert len(arrays) == len(texts)
    assert [tokenizer.decode(arrays.document(index).tolist()[1:-1]) for index in range(len(arrays))] == texts


def test_arrays_are_mapped_not_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    arrays = store(tmp_path, ["ab"], tokenizer)
    assert isinstance(arrays.tokens, np.memmap)
    assert np.shares_memory(arrays.document(0), arrays.tokens)
    with pytest.raises(ValueError, match="read-only"):
        arrays.tokens[0] = 1


def test_the_same_texts_give_the_same_bytes_and_others_another_digest(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = store(tmp_path / "one", ["ab", "c"], tokenizer)
    again = store(tmp_path / "again", ["ab", "c"], tokenizer)
    for name in ("tokens.npy", "bounds.npy", "meta.json"):
        assert sha256_file(tmp_path / "one" / name) == sha256_file(tmp_path / "again" / name)
    assert one.sha256 == again.sha256
    assert store(tmp_path / "other", ["a", "bc"], tokenizer).sha256 != one.sha256


@pytest.mark.parametrize(("highest_id", "dtype"), [(2**16 - 1, "uint16"), (2**16, "uint32")])
def test_ids_take_two_bytes_where_all_fit_and_four_elsewhere(tmp_path: Path, highest_id: int, dtype: str) -> None:
    vocabulary = {"a": 0, END_OF_TEXT: 1, "b": highest_id}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="a"))
    arrays = store(tmp_path, ["b"], tokenizer)
    assert arrays.tokens.dtype == dtype
    assert arrays.tokens.tolist() == [1, highest_id, 1]
    assert arrays.vocabulary_size == highest_id + 1


@pytest.mark.parametrize("index", [-1, 1])
def test_a_document_that_is_not_there_is_an_error(tmp_path: Path, tokenizer: Tokenizer, index: int) -> None:
    arrays = store(tmp_path, ["ab"], tokenizer)
    with pytest.raises(IndexError):
        arrays.document(index)


def test_arrays_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store(tmp_path, ["ab"], tokenizer)
    with pytest.raises(
        UserError, match="another tokenizer than the model's; run dvc repro to write it again"
    ) as raised:
        load_tokens(tmp_path, "other digest")
    assert str(raised.value).startswith(str(tmp_path))


def test_missing_arrays_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no token arrays; make them with dvc repro"):
        load_tokens(tmp_path, "digest")


def test_a_loaded_tokenizer_adds_cuts_and_pads_nothing(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    plain = tokenizer.encode("abcdef").ids
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, END)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(tmp_path / TOKENIZER_FILE))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("abcdef").ids == plain
    assert loaded.encode_batch_fast(["abcdef"])[0].ids == plain


def test_end_of_text_written_out_is_thirteen_characters(tokenizer: Tokenizer) -> None:
    assert END not in tokenizer.encode(END_OF_TEXT).ids
    assert len(tokenizer.encode(END_OF_TEXT).ids) == 13


@pytest.mark.parametrize("marked", [True, False])
def test_end_of_text_is_never_read_from_a_text_however_the_tokenizer_marks_it(marked: bool, tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / TOKENIZER_FILE))
    content = read_json(tmp_path / TOKENIZER_FILE)
    content["added_tokens"][0]["special"] = marked
    write_json(tmp_path / TOKENIZER_FILE, content)
    for splits in (True, False):
        write_json(tmp_path / TOKENIZER_CONFIG_FILE, {"split_special_tokens": splits})
        tokenizer = load_tokenizer(tmp_path)
        assert end_of_text_id(tokenizer) == END
        assert len(tokenizer.encode(END_OF_TEXT).ids) == 13


def test_special_tokens_in_a_text_are_tokens_unless_they_are_to_be_split(tmp_path: Path) -> None:
    byte_tokenizer((END_OF_TEXT, "<|user|>")).save(str(tmp_path / TOKENIZER_FILE))
    a = byte_tokenizer().encode("a").ids
    assert load_tokenizer(tmp_path).encode("<|user|>a").ids == [END + 1, *a]
    digest = tokenizer_sha256(tmp_path)
    write_json(tmp_path / TOKENIZER_CONFIG_FILE, {"split_special_tokens": False})
    assert tokenizer_sha256(tmp_path) == digest
    write_json(tmp_path / TOKENIZER_CONFIG_FILE, {"split_special_tokens": True})
    assert len(load_tokenizer(tmp_path).encode("<|user|>a").ids) == 9
    assert tokenizer_sha256(tmp_path) != digest  # the arrays of one do not fit the other


@pytest.mark.parametrize("prompt", ["caf\udce9", "half a pair: \ud83d"])
def test_a_prompt_that_utf8_cannot_hold_is_told(prompt: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=rf"prompt: its character {len(prompt) - 1} is not valid Unicode"):
        prompt_ids(tokenizer, prompt)


def test_a_prompt_begins_a_document(tokenizer: Tokenizer) -> None:
    assert prompt_ids(tokenizer, "") == [END]
    assert prompt_ids(tokenizer, "ab") == [END, *tokenizer.encode("ab").ids]


def test_vocabulary_counts_added_tokens() -> None:
    assert vocabulary_size(byte_tokenizer((END_OF_TEXT, "<|user|>"))) == 258


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"no <\|endoftext\|> token"):
        end_of_text_id(byte_tokenizer(()))


def test_tokenizer_digest_follows_content_not_layout(tmp_path: Path) -> None:
    file = tmp_path / TOKENIZER_FILE
    byte_tokenizer().save(str(file))
    digest = tokenizer_sha256(tmp_path)
    content = read_json(file)
    file.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert tokenizer_sha256(tmp_path) == digest
    write_json(file, content | {"normalizer": {"type": "Lowercase"}})
    assert tokenizer_sha256(tmp_path) != digest


@pytest.mark.parametrize("content", [None, "{"])
def test_a_tokenizer_file_that_cannot_be_read_is_reported(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / TOKENIZER_FILE).write_text(content)
    for read in (load_tokenizer, tokenizer_sha256):
        with pytest.raises(UserError, match=r"tokenizer\.json: (no such file|not JSON)"):
            read(tmp_path)
