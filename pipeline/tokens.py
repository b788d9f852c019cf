"""Texts as tokens: the tokenizer as this project uses it, and the arrays that `tokenize` writes per split.

Every document is end-of-text, its text, end-of-text: the first is context and never a label. A split's folder holds:

- `tokens.npy`, `[tokens]`, uint16 if every id fits, else uint32: a leading end-of-text, then each document's
  text followed by an end-of-text;
- `bounds.npy`, `[documents + 1]`, int64: the positions of those end-of-texts, so that document i, including both of
  its own, is `tokens[bounds[i] : bounds[i + 1] + 1]`;
- `meta.json`: the other fields of `TokenArrays`, the numbers of documents and tokens, and the dtype.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tokenizers import Encoding, Tokenizer

from pipeline.errors import UserError
from pipeline.files import read_json, write_json

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Every file that a tokenizer of `transformers` may consist of; this project reads only the first two."""

BATCH_CHARACTERS = 500_000
"""The approximate size of the texts to encode at a time: keeps every core busy, with little of the corpus in memory."""

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer in a model's folder, so that it encodes only the text itself.

    It adds no tokens, and neither truncates nor pads. The name of a special token in a text is that token, unless
    `split_special_tokens` in `tokenizer_config.json` is true, as in `transformers`; but that of end-of-text is always
    ordinary characters, so that no text can end a document. Raises `UserError` if a file is missing or not JSON.
    """
    tokenizer = Tokenizer.from_str(json.dumps(_read_tokenizer_json(folder)))
    tokenizer.encode_special_tokens = True  # the tokens that are marked as special are ordinary characters in a text
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_sha256(folder: Path) -> str:
    """Return the SHA-256 of the tokenizer as it is loaded, regardless of the layout of its file."""
    content = _read_tokenizer_json(folder)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the number of rows that an embedding needs: the highest id plus one, added tokens included."""
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return 1 + max(ids.values())


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of `<|endoftext|>`. Raises `UserError` if the tokenizer has none."""
    token_id = tokenizer.token_to_id(END_OF_TEXT)
    if token_id is None:
        raise UserError(f"the tokenizer has no {END_OF_TEXT} token, which separates documents; use one that has it")
    return int(token_id)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a prompt as the beginning of a document: end-of-text, then its text.

    Raises `UserError` for a prompt that UTF-8 cannot hold: half of a surrogate pair, or a byte of another encoding
    that came from a terminal.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"prompt: its character {error.start} is not valid Unicode; give the text as UTF-8") from error
    # Unlike `encode`, this lets other threads run: a server may be sent megabytes.
    (encoding,) = tokenizer.encode_batch_fast([prompt])
    return [end_of_text_id(tokenizer), *encoding.ids]


@dataclass(frozen=True, slots=True)
class TokenArrays:
    """The token arrays of one split, mapped into memory. Its length is the number of documents."""

    tokens: Tokens
    bounds: NDArray[np.int64]
    tokenizer_sha256: str
    vocabulary_size: int
    end_of_text_id: int
    text_bytes: int
    """The size of all texts in UTF-8."""
    sha256: str
    """The SHA-256 of `tokens`, little-endian. It also identifies the bounds, because no text contains end-of-text."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def document(self, index: int) -> Tokens:
        """Return a view of document `index` (from 0), which begins and ends with end-of-text."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.bounds[index] : self.bounds[index + 1] + 1]

    def texts(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Yield the text of every document."""
        for index in range(len(self)):
            yield tokenizer.decode(self.document(index)[1:-1].tolist(), skip_special_tokens=False)

    def document_tokens(self) -> NDArray[np.int64]:
        """Return the length of every document, `[documents]`, including both of its end-of-texts."""
        return np.diff(self.bounds) + 1


def write_tokens(folder: Path, texts: Iterable[str], tokenizer: Tokenizer, tokenizer_sha256: str) -> None:
    """Encode one text per document and write the arrays to `folder`, which exists; memory holds one batch of texts.

    A text without tokens is still a document. The same texts and tokenizer give the same bytes.
    """
    end_of_text, size = end_of_text_id(tokenizer), vocabulary_size(tokenizer)
    dtype = np.dtype("<u2" if size <= 2**16 else "<u4")
    documents, tokens, text_bytes, digest = 0, 1, 0, hashlib.sha256()
    with (folder / "tokens.npy").open("wb") as tokens_file, (folder / "bounds.npy").open("wb") as bounds_file:
        # NumPy pads a header so that its length does not depend on the shape, which is known only at the end.
        write_header(tokens_file, dtype, 0)
        write_header(bounds_file, np.int64, 0)
        digest.update(_append(tokens_file, np.array([end_of_text], dtype)))
        _append(bounds_file, np.zeros(1, np.int64))
        for batch, encodings in _encode(texts, tokenizer):
            ids = [token_id for encoding in encodings for token_id in (*encoding.ids, end_of_text)]
            lengths = np.array([len(encoding) + 1 for encoding in encodings], np.int64)
            digest.update(_append(tokens_file, np.array(ids, dtype)))
            _append(bounds_file, tokens - 1 + np.cumsum(lengths))
            documents += len(batch)
            tokens += len(ids)
            text_bytes += sum(len(text.encode()) for text in batch)
        write_header(tokens_file, dtype, tokens)
        write_header(bounds_file, np.int64, documents + 1)
    meta = {
        "tokenizer_sha256": tokenizer_sha256,
        "vocabulary_size": size,
        "end_of_text_id": end_of_text,
        "documents": documents,
        "tokens": tokens,
        "dtype": dtype.name,
        "text_bytes": text_bytes,
        "sha256": digest.hexdigest(),
    }
    write_json(folder / "meta.json", meta)


def load_tokens(folder: Path, tokenizer_sha256: str) -> TokenArrays:
    """Map the arrays of a split. Raises `UserError` if they are missing or were written with another tokenizer."""
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder}: holds no token arrays; make them with dvc repro tokenize")
    meta = read_json(folder / "meta.json")
    if meta["tokenizer_sha256"] != tokenizer_sha256:
        raise UserError(
            f"{folder}: was written with another tokenizer than the model's; run dvc repro to write it again"
        )
    return TokenArrays(
        tokens=np.load(folder / "tokens.npy", mmap_mode="r"),
        bounds=np.load(folder / "bounds.npy", mmap_mode="r"),
        tokenizer_sha256=meta["tokenizer_sha256"],
        vocabulary_size=meta["vocabulary_size"],
        end_of_text_id=meta["end_of_text_id"],
        text_bytes=meta["text_bytes"],
        sha256=meta["sha256"],
    )


def _read_tokenizer_json(folder: Path) -> dict[str, Any]:
    """Return `tokenizer.json`, with only those tokens marked as special that are ordinary characters in a text."""
    file, config_file = folder / TOKENIZER_FILE, folder / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{file}: no such file; the model's folder must hold its tokenizer as {TOKENIZER_FILE}")
    content = _read_json(file)
    splits = config_file.is_file() and _read_json(config_file).get("split_special_tokens", False)
    for token in content.get("added_tokens", []):
        token["special"] = token["content"] == END_OF_TEXT or (token["special"] and splits)
    return content


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}; fetch or save the tokenizer again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds {content!r:.40}, must be an object; fetch or save the tokenizer again")
    return content


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[list[str], list[Encoding]]]:
    """Yield batches of texts with their encodings; a batch is encoded while the one before it is written."""
    with ThreadPoolExecutor(1) as thread:
        before: tuple[list[str], Future[list[Encoding]]] | None = None
        for batch in _batches(texts):
            encodings = thread.submit(tokenizer.encode_batch_fast, batch)
            if before is not None:
                yield before[0], before[1].result()
            before = batch, encodings
        if before is not None:
            yield before[0], before[1].result()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _append(file: BinaryIO, values: NDArray[np.integer]) -> bytes:
    """Write the values, and return their bytes."""
    data = values.tobytes()
    file.write(data)
    return data


def write_header(file: BinaryIO, dtype: DTypeLike, length: int) -> None:
    """Write the header of an array with one axis to the beginning of an .npy file."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)
