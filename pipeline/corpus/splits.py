"""Assign documents to splits by the hash of their content."""

from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def choose_split(digest: bytes, *, validation_share: float, test_share: float) -> Split:
    """Choose the split of a document from the digest of its words (`words.digest`).

    The split depends on nothing else, so adding or removing documents never moves another one, and a document that
    occurs in two corpora is in the same split of both.
    """
    position = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1]
    if position < test_share:
        return "test"
    if position < test_share + validation_share:
        return "validation"
    return "train"
