"""Deduplication with an index in memory, which `prepare` had before it sorted on disk: the reference of the tests."""

from datasketch import MinHash, MinHashLSH

from pipeline.corpus.deduplication import Repeat
from pipeline.corpus.similarity import Hashes, choose_bands, fingerprint, jaccard, minhash
from pipeline.params.prepare import NearDuplicateParams


class IndexInMemory:
    """The digests, shingles and MinHashes of the documents kept so far."""

    def __init__(self, params: NearDuplicateParams) -> None:
        self._params = params
        bands = choose_bands(params.permutations, params.jaccard)
        self._index = MinHashLSH(num_perm=params.permutations, params=bands)
        self._by_digest: dict[bytes, int] = {}
        self._kept: dict[int, Hashes] = {}

    def admit(self, row: int, text: str) -> Repeat | None:
        """Keep a document, or return the kept one that it repeats: the first that is alike enough."""
        digest, shingles = fingerprint(text, self._params.ngram_words)
        if digest in self._by_digest:
            return Repeat("exact_duplicate", self._by_digest[digest], 1.0)
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
        self._by_digest[digest] = row
        self._kept[row] = shingles
        return None
