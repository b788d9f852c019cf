"""Fenced blocks and code spans are found as CommonMark defines them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.fences import split_code, split_fences


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a\n```\nb\n```\nc", ["```\nb\n```\n"]),
        ("```py\n~~~\n```\n~~~\nx\n~~~", ["```py\n~~~\n```\n", "~~~\nx\n~~~"]),
        ("````\n```\n````\n", ["````\n```\n````\n"]),
        ("   ```\nx\n  ```\n    ```\ny", ["   ```\nx\n  ```\n"]),  # four spaces open nothing
        ("```\nnever closed", []),
        ("use `a` and ``b`c`` but not ` alone", ["`a`", "``b`c``"]),
        ("`a\nb`", []),
        ("```inline``` and `x`", ["`x`"]),
    ],
)
def test_code_is_found(text: str, code: list[str]) -> None:
    assert [part for part, is_code in split_code(text) if is_code] == code


@given(st.text(alphabet="`~ a\n"))
def test_parts_make_the_text(text: str) -> None:
    for split in (split_fences, split_code):
        assert "".join(part for part, _ in split(text)) == text
