"""Time `prepare` and its memory on mixed sentences with planted duplicates, beside datatrove's MinHash deduplication.

Both get the same documents, in as many files as there are cores, one after the other. Memory is the peak of the sum of
the proportional sizes (PSS) of all processes, looked at every quarter of a second; temporary files likewise.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from planted import Planted, read_sentences, write_documents
from report import publish

from pipeline import machine
from pipeline.corpus.similarity import choose_bands
from pipeline.errors import UserError, report_errors
from pipeline.files import read_json, size_of
from pipeline.params.file import load_section
from pipeline.params.prepare import NearDuplicateParams, PrepareParams

WATCH_S = 0.25
PEER = Path(__file__).with_name("datatrove_peer.py")


@dataclass(frozen=True, slots=True)
class Run:
    """What a process took."""

    seconds: float
    peak_bytes: int
    written_bytes: int
    """The most that its files, output included, took at once."""
    output: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder of text files whose sentences are mixed")
    parser.add_argument("--megabytes", type=float, default=400, help="default: %(default)s")
    parser.add_argument("--peer-python", help="a Python that has datatrove installed; without it, no peer is run")
    parser.add_argument("--work", type=Path, help="folder for documents and outputs, several times their size")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    with report_errors(), tempfile.TemporaryDirectory(dir=arguments.work) as name:
        publish(benchmark(arguments.texts, arguments.megabytes, arguments.peer_python, Path(name)), arguments.out)


def benchmark(texts: Path, megabytes: float, peer_python: str | None, work: Path) -> str:
    """Return the text of the result."""
    params = load_section("prepare", PrepareParams).near_duplicate
    workers = os.cpu_count() or 1
    data = work / "data"
    planted = plant(data, texts, megabytes, workers)
    data_bytes = size_of([data])
    lines = [
        *(f"{name}: {value}" for name, value in machine.describe().items()),
        f"{data_bytes / 1e6:,.0f} MB of JSON lines in {workers} files with {planted.documents:,} documents; planted: "
        f"{planted.exact:,} exact and {planted.near:,} near-duplicates of others; {workers} processes",
        "",
    ]
    own = watch([sys.executable, "-m", "pipeline.stages.prepare", str(data), str(work / "prepare")], work)
    dropped = read_json(work / "prepare" / "report.json")["dropped"]
    found = f"found {dropped['exact_duplicate']:,} exact and {dropped['near_duplicate']:,} near-duplicates"
    lines.append(describe("prepare", own, data_bytes, found))
    shutil.rmtree(work / "prepare")
    if peer_python:
        command = peer_command(peer_python, params, data, work / "peer", workers)
        other = watch(command, work)
        version, kept = other.output.split()[-2:]
        removed = planted.documents - int(kept)
        lines.append(describe(f"datatrove {version}", other, data_bytes, f"removed {removed:,} documents"))
        lines.append(f"prepare / datatrove: {other.seconds / own.seconds:.2f} times the rate")
    return "\n".join(lines) + "\n"


def plant(data: Path, texts: Path, megabytes: float, count: int) -> Planted:
    """Write documents to `count` files, each with families of its own, and return how many there are in all."""
    data.mkdir()
    sentences = read_sentences(texts)
    parts = [
        write_documents(data / f"{number}.jsonl", sentences, megabytes / count, seed=number + 1)
        for number in range(count)
    ]
    return Planted(*(sum(getattr(part, name) for part in parts) for name in ("documents", "exact", "near")))


def peer_command(python: str, params: NearDuplicateParams, data: Path, work: Path, workers: int) -> list[str]:
    bands, rows = choose_bands(params.permutations, params.jaccard)
    options = {"workers": workers, "ngram-words": params.ngram_words, "bands": bands, "rows": rows}
    return [python, str(PEER), str(data), str(work), *(f"--{name}={value}" for name, value in options.items())]


def watch(command: list[str], work: Path) -> Run:
    """Run a command, and look at its memory and at the size of what it writes in `work`."""
    before_bytes = size_of([work])
    peak_bytes = written_bytes = 0
    began_s = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=output, stderr=errors, text=True) as process:
            while process.poll() is None:
                peak_bytes = max(peak_bytes, memory_of(process.pid))
                with suppress(FileNotFoundError):  # what is removed meanwhile
                    written_bytes = max(written_bytes, size_of([work]) - before_bytes)
                time.sleep(WATCH_S)
        seconds = time.perf_counter() - began_s
        for stream in (output, errors):
            stream.seek(0)
        if process.returncode:
            raise UserError(f"{command[1]}: {' '.join(errors.read().split())[-300:]}")
        return Run(seconds, peak_bytes, written_bytes, output.read())


def memory_of(process: int) -> int:
    """Return the proportional size of a process and its descendants."""
    total_bytes = 0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for own in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total_bytes += own.memory_full_info().pss
    return total_bytes


def describe(name: str, run: Run, data_bytes: int, found: str) -> str:
    rate = data_bytes / 1e6 / run.seconds
    return (
        f"{name}: {run.seconds:.0f} s, {rate:.2f} MB/s; memory {run.peak_bytes / 1e6:,.0f} MB; "
        f"files {run.written_bytes / 1e6:,.0f} MB at once; {found}"
    )


if __name__ == "__main__":
    main()
