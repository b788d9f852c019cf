"""The split of a document depends only on its words."""

import hashlib
from collections import Counter

import pytest

from pipeline.corpus.splits import choose_split


@pytest.mark.parametrize(
    ("head", "split"),
    [("00", "test"), ("19", "test"), ("1a", "validation"), ("4c", "validation"), ("4d", "train"), ("ff", "train")],
)
def test_split_follows_the_digest_as_a_number(head: str, split: str) -> None:
    digest = bytes.fromhex(head + "ff" * 31) if head == "ff" else bytes.fromhex(head + "00" * 31)
    assert choose_split(digest, validation_share=0.2, test_share=0.1) == split  # 0x1a/256 = 0.102, 0x4d/256 = 0.301


def test_shares_are_met() -> None:
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(20_000)]
    counts = Counter(choose_split(digest, validation_share=0.1, test_share=0.2) for digest in digests)
    assert counts["test"] / 20_000 == pytest.approx(0.2, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.1, abs=0.01)
