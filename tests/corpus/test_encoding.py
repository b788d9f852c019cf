"""Encodings are detected, and binary and damaged files refused."""

import codecs
from pathlib import Path

import pytest

from pipeline.corpus.encoding import detect_encoding
from pipeline.errors import UserError

TEXT = "“Naïve café,” she said — twice.\n"


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"", "utf-8"),
        (TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF8 + TEXT.encode(), "utf-8-sig"),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), "utf-16"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "utf-16"),
        (TEXT.encode("windows-1252"), "windows-1252"),
    ],
)
def test_encoding_is_found_and_reads_the_text(tmp_path: Path, content: bytes, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert detect_encoding(path) == encoding
    assert path.read_text(encoding=encoding) == (TEXT if content else "")


def test_bytes_after_the_first_chunk_count(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * 300_000 + "é".encode("windows-1252"))
    assert detect_encoding(path) == "windows-1252"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        # 0x81 is undefined in Windows-1252, 0xe9 is its é.
        (b"One.\nTw\x81o.\n", r"2: byte 3 of the line, 0x81, is neither UTF-8 nor Windows-1252"),
        (b"caf\xe9 \x81", r"1: byte 6 of the line, 0x81, is neither UTF-8 nor Windows-1252"),
        (TEXT.encode() * 3 + b"caf\xe9\n" + TEXT.encode(), r"4: byte 4 of the line, 0xe9, is not UTF-8"),
        (TEXT.encode() * 3 + b"\x81\n", r"4: byte 1 of the line, 0x81, is not UTF-8"),
        (codecs.BOM_UTF8 + b"One.\n\xff\xff", r"2: byte 1 of the line, 0xff, is not UTF-8"),
        (TEXT.encode() * 100_000 + "“".encode()[:2], r"100001: byte 1 of the line, 0xe2, is not UTF-8"),
    ],
)
def test_bad_byte_is_named_by_file_line_and_value(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt:{place}; correct it, or save the file as UTF-8$"):
        detect_encoding(path)


@pytest.mark.parametrize(
    "content",
    [
        b"text\0text",
        b"\x89PNG\r\n\x1a\n" + bytes(range(1, 32)) * 20,
        b"ok \x1b\x02\x03",
        codecs.BOM_UTF16_LE + b"\x00\xd8",  # half of a surrogate pair
        codecs.BOM_UTF16_LE + "One.\n".encode("utf-16-le") + b"\xe9",  # half of a character
        codecs.BOM_UTF32_LE + "text".encode("utf-32-le"),
    ],
)
def test_binary_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt: not a text file"):
        detect_encoding(path)
