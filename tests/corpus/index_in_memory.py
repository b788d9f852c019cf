"""Deduplication with an index in memory, which `prepare` had before it sorted on disk: the reference of the tests."""

from datasketch import MinHash, MinHashLSH

from pipeline.corpus.deduplication import Repeat
from pipeline.corpus.similarity import Hashes, choose_bands, hash_ngrams, jaccard, make_set, minhash
from pipeline.corpus.words import join_words
from pipeline.params.prepare import NearDuplicateParams


class IndexInMemory:
    """The words, shingles and MinHashes of the documents kept so far."""

    def __init__(self, params: NearDuplicateParams) -> None:
        self._params = params
        bands = choose_bands(params.permutations, params.jaccard)
        self._index = MinHashLSH(num_perm=params.permutations, params=bands)
        self._by_words: dict[bytes, int] = {}
        self._kept: dict[int, Hashes] = {}

    def admit(self, row: int, text: str) -> Repeat | None:
        """Keep a document, or return the kept one that it repeats: the first that is alike enough."""
        words = join_words(text)
        if words in self._by_words:
            return Repeat("exact_duplicate", self._by_words[words], 1.0)
        (hashes,) = hash_ngrams([words], self._params.ngram_words)
        shingles = make_set(hashes)
        sketch = MinHash(
            num_perm=self._params.permutations,
            hashfunc=int,
            scheme="affine64",
            hashvalues=minhash(shingles, self._params.permutations),
        )
        for kept in sorted(self._index.query(sketch)):
            similarity = jaccard(shingles, self._kept[kept])
            if similarity >= self._params.jaccard:
                return Repeat("near_duplicate", kept, similarity)
        self._index.insert(row, sketch)
        self._by_words[words] = row
        self._kept[row] = shingles
        return None
