"""Documents to splits, by hash of their content."""

from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def choose_split(digest: bytes, *, validation_share: float, test_share: float) -> Split:
    """The split of a document with this digest of its words (`words.digest`).

    It depends on nothing else, so documents added or removed never move another, and one that stands in two corpora is
    in the same split of both.
    """
    position = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1]
    if position < test_share:
        return "test"
    if position < test_share + validation_share:
        return "validation"
    return "train"
