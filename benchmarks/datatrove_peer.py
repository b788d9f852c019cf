"""datatrove's MinHash deduplication, for `prepare.py`, which runs this with a Python that has datatrove installed.

It is set up as much like `prepare` as it can be: ftfy, the same n-grams, bands and rows, local processes. Its words are
those between white space, which is its fastest way. It prints its version and the number of documents
that it kept.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.word_tokenizers import WordTokenizer


class Words(WordTokenizer):
    """Words between white space."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--ngram-words", type=int, required=True)
    parser.add_argument("--bands", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    arguments = parser.parse_args()
    work, workers = arguments.work, arguments.workers
    config = MinhashConfig(n_grams=arguments.ngram_words, num_buckets=arguments.bands, hashes_per_bucket=arguments.rows)
    clean = FTFYFormatter(uncurl_quotes=True, fix_line_breaks=True, fix_latin_ligatures=True, normalization="NFC")
    # Its filter needs the same documents again, so they are cleaned once and written.
    run(
        work / "1", workers, JsonlReader(str(arguments.data)), clean, JsonlWriter(str(work / "clean"), compression=None)
    )
    cleaned = JsonlReader(str(work / "clean"))
    signatures = MinhashDedupSignature(str(work / "signatures"), config)
    signatures.word_tokenizer = Words()
    run(work / "2", workers, cleaned, signatures)
    buckets = MinhashDedupBuckets(str(work / "signatures"), str(work / "buckets"), config=config)
    run_tasks(work / "3", workers, arguments.bands, buckets)
    run_tasks(work / "4", 1, 1, MinhashDedupCluster(str(work / "buckets"), str(work / "removed"), config=config))
    keep = MinhashDedupFilter(str(work / "removed"))
    run(work / "5", workers, cleaned, keep, JsonlWriter(str(work / "kept"), compression=None))
    print(version("datatrove"), sum(1 for file in (work / "kept").iterdir() for _ in file.open("rb")))


def run(logs: Path, workers: int, *steps: PipelineStep) -> None:
    """Run steps on every file, of which there are as many as workers."""
    run_tasks(logs, workers, workers, *steps)


def run_tasks(logs: Path, workers: int, tasks: int, *steps: PipelineStep) -> None:
    LocalPipelineExecutor(pipeline=list(steps), tasks=tasks, workers=workers, logging_dir=str(logs)).run()


if __name__ == "__main__":
    main()
