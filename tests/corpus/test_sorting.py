"""More pairs than memory holds come back in the order of their keys, equal keys together."""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import sorting
from pipeline.corpus.sorting import ExternalSort

KEYS = st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=30), max_size=8)


@settings(max_examples=60)
@given(KEYS, st.sampled_from([1, 4, 50]), st.sampled_from([1, 3, 1024]))
def test_pairs_come_in_the_order_of_their_keys(parts: list[list[int]], run_pairs: int, sample_step: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "RUN_PAIRS", run_pairs)
        patch.setattr(sorting, "_SAMPLE_STEP", sample_step)
        pairs = ExternalSort(Path(folder) / "pairs")
        count = 0
        for part in parts:
            pairs.add(np.array(part, np.uint64), np.arange(count, count + len(part), dtype=np.uint64))
            count += len(part)
        blocks = [(keys.tolist(), values.tolist()) for keys, values in pairs.blocks()]
    expected = sorted((key, value) for value, key in enumerate(key for part in parts for key in part))
    assert sorted(pair for keys, values in blocks for pair in zip(keys, values, strict=True)) == expected
    assert [key for keys, _ in blocks for key in keys] == [key for key, _ in expected]
    ends = [(before[0][-1], after[0][0]) for before, after in pairwise(blocks)]
    assert all(last < first for last, first in ends)


def test_a_block_is_a_part_of_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "RUN_PAIRS", 10_000)
    pairs = ExternalSort(tmp_path / "pairs")
    draw = np.random.default_rng(1)
    for _ in range(40):
        pairs.add(draw.integers(0, 2**64, 5000, dtype=np.uint64), np.zeros(5000, np.uint64))
    sizes = [len(keys) for keys, _ in pairs.blocks()]
    assert sum(sizes) == 200_000
    assert max(sizes) < 40_000
