"""Encode the documents of every split into arrays of tokens, with the base's tokenizer."""

import argparse
from pathlib import Path

from pipeline.corpus.special_tokens import SpecialTokenCounts
from pipeline.corpus.splits import SPLITS
from pipeline.errors import UserError, report_errors
from pipeline.files import count_lines, read_json, read_jsonl, whole_folder, write_json
from pipeline.object_store import find_output, name_store_in_errors
from pipeline.progress import progress
from pipeline.stage_process import stage_process
from pipeline.tokens import TokenArrays, load_tokenizer, load_tokens, tokenizer_sha256, write_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents", help="folder of the prepare stage, or its s3:// address")
    parser.add_argument("base", type=Path, help="folder of the base stage")
    parser.add_argument("out", type=Path, help="folder to write the token arrays to")
    arguments = parser.parse_args()
    with report_errors(), stage_process(arguments.out), name_store_in_errors(arguments.documents):
        tokenize(find_output(arguments.documents), arguments.base, arguments.out)


def tokenize(documents: Path, base: Path, out: Path) -> None:
    """Write a folder of token arrays per split and `report.json` to `out`. Raises `UserError` if a file is missing."""
    files = {split: documents / f"{split}.jsonl" for split in SPLITS}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{file}: no such file; make it with dvc repro prepare")
    tokenizer, sha256 = load_tokenizer(base), tokenizer_sha256(base)
    context_length = read_json(base / "config.json")["n_positions"]
    counts = SpecialTokenCounts(tokenizer)
    report = {}
    with whole_folder(out) as partial:
        for split, file in files.items():
            (partial / split).mkdir()
            bar = progress(read_jsonl(file), description=split, total=count_lines(file), unit=" documents")
            write_tokens(partial / split, counts.count(row["text"] for row in bar), tokenizer, sha256)
            report[split] = summarize(load_tokens(partial / split, sha256), context_length)
            print(f"{split}: {report[split]['documents']:,} documents, {report[split]['tokens']:,} tokens")
        whole = {"context_length": context_length, "tokenizer_sha256": sha256, "special_tokens": counts.to_json()}
        write_json(partial / "report.json", report | whole)
    for line in counts.describe():
        print(line)


def summarize(arrays: TokenArrays, context_length: int) -> dict[str, int | float | None]:
    """Return the figures of a split for the report.

    `tokens` includes the end-of-texts, and the length of a document includes its two. `bytes_per_token` is that of the
    texts alone, null if they have no tokens. A document longer than `context_length` takes several windows.
    """
    lengths = arrays.document_tokens()
    text_tokens = len(arrays.tokens) - len(arrays) - 1
    return {
        "documents": len(arrays),
        "tokens": len(arrays.tokens),
        "bytes": arrays.text_bytes,
        "bytes_per_token": arrays.text_bytes / text_tokens if text_tokens else None,
        "longest_document_tokens": int(lengths.max(initial=0)),
        "documents_longer_than_context": int((lengths > context_length).sum()),
    }


if __name__ == "__main__":
    main()
