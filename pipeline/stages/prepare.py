"""Turn the files of a folder into clean documents in three splits, each document once."""

import argparse

from pipeline.corpus.preparation import prepare
from pipeline.corpus.report import Report
from pipeline.errors import report_errors
from pipeline.object_store import find_folder, name_store_in_errors, open_output, upload
from pipeline.params.file import load_section
from pipeline.params.prepare import PrepareParams
from pipeline.stage_process import stage_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder of .txt, .md, .jsonl, .csv and .parquet files, or its s3:// address")
    parser.add_argument("out", help="folder to write the documents to, or its s3:// address")
    arguments = parser.parse_args()
    with report_errors():
        params = load_section("prepare", PrepareParams)
        data, out = find_folder(arguments.data), open_output(arguments.out, params.temporary_folder)
        with stage_process(out), name_store_in_errors(arguments.data):
            report = prepare(data, out, params)
            upload(out, arguments.out)
        print(summarize(report))


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
