"""Turn the files of a folder into clean documents in three splits, each document once."""

import argparse
from collections import Counter
from pathlib import Path

from pipeline.corpus.preparation import prepare
from pipeline.corpus.report import DROPPED, Report
from pipeline.errors import report_errors
from pipeline.params.file import load_section
from pipeline.params.prepare import PrepareParams
from pipeline.stage_process import stage_process

MARKUP_FILES = 3
"""The most files that the summary names as those with markup."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of .txt, .md, .jsonl, .csv and .parquet files")
    parser.add_argument("out", type=Path, help="folder to write the documents to")
    arguments = parser.parse_args()
    with report_errors(), stage_process(arguments.out):
        print(summarize(prepare(arguments.data, arguments.out, load_section("prepare", PrepareParams))))


def summarize(report: Report) -> str:
    """Return the counts of a report in one line."""
    dropped = ", ".join(f"{report.outcomes[outcome]} {outcome.replace('_', ' ')}" for outcome in DROPPED)
    sizes = ", ".join(f"{size.documents} {split} ({size.words:,} words)" for split, size in report.splits.items())
    kept, rows = report.outcomes["kept"], report.outcomes.total()
    notices = sum(file.count_characters()["dropped"]["notices"] for file in report.files)
    return (
        f"prepare: kept {kept} of {rows} rows from {len(report.files)} files; dropped {dropped}, "
        f"{notices:,} characters of notices, {_describe_markup(report)}; {sizes}"
    )


def _describe_markup(report: Report) -> str:
    """Return the characters of removed markup, with the files that had most of it."""
    by_file = Counter({file.source.name: file.removed["markup"] for file in report.files if file.removed["markup"]})
    most = [f"{name} {count:,}" for name, count in by_file.most_common(MARKUP_FILES)]
    if len(by_file) > MARKUP_FILES:
        most.append(f"{len(by_file) - MARKUP_FILES} more files")
    return f"{by_file.total():,} of markup" + (f" ({', '.join(most)})" if most else "")


if __name__ == "__main__":
    main()
