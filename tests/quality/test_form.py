"""The share of texts that keep a form."""

import re

from pipeline.quality.form import share_matching


def test_share_matching_searches_anywhere_in_a_text() -> None:
    assert share_matching(["# One\n\nText", "Two", "x # y", ""], re.compile("# ")) == 0.5


def test_anchors_and_flags_are_the_patterns_own() -> None:
    whole = re.compile(r"(?s)\A# [^\n]+\n\n.+\Z")
    assert share_matching(["# One\n\nA\nB", " # One\n\nA"], whole) == 0.5


def test_no_text_matches_nothing() -> None:
    assert share_matching([], re.compile("")) == 0
