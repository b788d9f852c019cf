"""Exact and near-duplicates found on disk are those that an index in memory finds."""

import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_in_memory import IndexInMemory

from pipeline.corpus import deduplication, sorting
from pipeline.corpus.deduplication import Deduplicator, Repeat
from pipeline.corpus.similarity import band_keys, choose_bands, hash_ngrams, make_set, minhash
from pipeline.corpus.words import digest, join_words
from pipeline.params.prepare import NearDuplicateParams

PARAMS = NearDuplicateParams(ngram_words=5, jaccard=0.6, permutations=128)
LOOSE = NearDuplicateParams(ngram_words=1, jaccard=0.4, permutations=64)


def find_repeats(texts: list[str], params: NearDuplicateParams = PARAMS, step: int = 3) -> list[Repeat | None]:
    """Return what each text repeats; rows are related `step` at a time."""
    bands, rows = choose_bands(params.permutations, params.jaccard)
    words = [join_words(text) for text in texts]
    sets = [make_set(hashes) for hashes in hash_ngrams(words, params.ngram_words)]
    with tempfile.TemporaryDirectory() as folder:
        found = Deduplicator(Path(folder), bands=bands, min_jaccard=params.jaccard)
        for row, (text, shingles) in enumerate(zip(words, sets, strict=True)):
            keys = band_keys(minhash(shingles, params.permutations)[None], bands, rows)
            number = int.from_bytes(digest(text)[:8], "big")
            found.note(np.array([row], np.uint64), np.array([number], np.uint64), keys)
        found.compare(lambda _: None)
        repeats = []
        for start in range(0, len(texts), step):
            rows_here = range(start, min(start + step, len(texts)))
            relations = found.relate(rows_here.stop)
            repeats += [
                found.admit(row, relations, sets[row] if row in relations.buckets else None) for row in rows_here
            ]
    return repeats


def in_memory(texts: list[str], params: NearDuplicateParams) -> list[Repeat | None]:
    index = IndexInMemory(params)
    return [index.admit(row, text) for row, text in enumerate(texts)]


def random_words(seed: int, count: int) -> list[str]:
    numbers = random.Random(seed)
    return [f"w{numbers.randrange(10_000)}" for _ in range(count)]


def changed(words: list[str], changes: list[int]) -> list[str]:
    return [f"new{index}" if index in changes else word for index, word in enumerate(words)]


FAMILIES = st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 23), max_size=10)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(FAMILIES, st.sampled_from([PARAMS, LOOSE]), st.sampled_from([1, 7, 100]), st.sampled_from([4, 1 << 21]))
def test_families_of_duplicates_are_those_of_the_index_in_memory(
    families: list[tuple[int, list[int]]], params: NearDuplicateParams, step: int, run_pairs: int
) -> None:
    texts = [" ".join(changed(random_words(family, 24), changes)) for family, changes in families]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "RUN_PAIRS", run_pairs)
        patch.setattr(sorting, "_SAMPLE_STEP", 2)
        patch.setattr(deduplication, "BATCH_ROWS", 5)
        patch.setattr(deduplication, "BUCKET_NUMBERS", 2)
        assert find_repeats(texts, params, step) == in_memory(texts, params)


def test_exact_duplicate_repeats_the_first() -> None:
    text = " ".join(random_words(2, 50))
    assert find_repeats([text, text.upper(), text]) == [None, *[Repeat("exact_duplicate", 0, 1.0)] * 2]


@pytest.mark.parametrize("changes", range(0, 60, 4))
def test_exact_jaccard_decides_on_near_duplicates(changes: int) -> None:
    words = random_words(3, 300)
    retold = changed(words, list(range(0, 5 * changes, 5)))
    repeats = find_repeats([" ".join(words), " ".join(retold)])
    assert repeats == in_memory([" ".join(words), " ".join(retold)], PARAMS)
    assert (repeats[1] is not None) == (changes <= 12)


def test_document_alike_to_a_dropped_one_only_is_kept() -> None:
    words = random_words(4, 200)
    texts = [words, words[45:] + random_words(5, 5), words[90:] + random_words(5, 5)]
    repeats = find_repeats([" ".join(own) for own in texts])
    assert [repeat is None for repeat in repeats] == [True, False, True]


def test_copy_of_a_near_duplicate_repeats_what_that_repeats() -> None:
    words = random_words(6, 100)
    near = " ".join(words[:-2])
    repeats = find_repeats([" ".join(words), near, near.upper()], step=1)
    assert repeats[1] == repeats[2] == Repeat("near_duplicate", 0, pytest.approx(94 / 96))


def test_documents_shorter_than_an_ngram_are_compared() -> None:
    assert find_repeats(["one two", "two one", "One, two!"]) == [None, None, Repeat("exact_duplicate", 0, 1.0)]


def test_rows_without_words_are_numbered_too(tmp_path: Path) -> None:
    found = Deduplicator(tmp_path, bands=2, min_jaccard=0.6)
    numbers = np.array([3, 8], np.uint64)
    found.note(numbers, np.array([7, 7], np.uint64), np.array([[1, 2], [1, 2]], np.uint64))
    found.compare(lambda _: None)
    relations = found.relate(9)
    assert relations.first == {8: 3}
    assert not relations.buckets
    assert found.admit(8, relations, None) == Repeat("exact_duplicate", 3, 1.0)


def test_rows_that_share_many_keys_are_in_one_bucket(tmp_path: Path) -> None:
    found = Deduplicator(tmp_path, bands=4, min_jaccard=0.6)
    keys = [[1, 2, 3, 4], [1, 2, 3, 5], [6, 6, 3, 5], [7, 8, 9, 10]]
    found.note(np.arange(4, dtype=np.uint64), np.arange(4, dtype=np.uint64), np.array(keys, np.uint64))
    found.compare(lambda _: None)
    buckets = found.relate(4).buckets
    # 1 and 2 are shared by rows 0 and 1; 3 by rows 0, 1 and 2; 5 by rows 1 and 2; 6 and 7 to 10 by no two rows.
    assert {row: len(own) for row, own in buckets.items()} == {0: 2, 1: 3, 2: 2}
