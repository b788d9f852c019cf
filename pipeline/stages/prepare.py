"""Turn the files of a folder into clean documents in three splits, each document once."""

import argparse
from pathlib import Path

from pipeline.corpus.preparation import prepare
from pipeline.corpus.report import Report
from pipeline.errors import report_errors
from pipeline.params.file import load_section
from pipeline.params.prepare import PrepareParams
from pipeline.stage_process import stage_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of .txt, .md, .jsonl, .csv and .parquet files")
    parser.add_argument("out", type=Path, help="folder to write the documents to")
    arguments = parser.parse_args()
    with report_errors(), stage_process(arguments.out):
        print(summarize(prepare(arguments.data, arguments.out, load_section("prepare", PrepareParams))))


def summarize(report: Report) -> str:
    """Return the counts of a report in one line, and in another the files that are not UTF-8."""
    sizes = ", ".join(f"{size.documents} {split} ({size.words:,} words)" for split, size in report.splits.items())
    kept, rows = report.outcomes["kept"], report.outcomes.total()
    summary = (
        f"prepare: kept {kept} of {rows} rows from {len(report.files)} files; dropped {report.describe_dropped()}; "
        f"{sizes}"
    )
    encodings = report.describe_encodings()
    return f"{summary}\nprepare: read as {encodings} (prepare.encoding changes it)" if encodings else summary


if __name__ == "__main__":
    main()
