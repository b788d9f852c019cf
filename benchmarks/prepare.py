"""Time `prepare` and its memory on mixed sentences with planted duplicates, beside datatrove's MinHash deduplication.

Both get the same documents, in as many files as there are cores, one after the other. Memory is the peak of
the sum over all processes of their proportional sizes (PSS), looked at every quarter of a second: what is theirs alone,
and the mapped files, which the system takes back when it needs memory. Files in the work folder are looked at likewise.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

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
PHASES = {"cleaning": "rows", "comparing": "firsts", "writing": "shingles"}
"""The phases of `prepare` after the first, and the temporary file with which each begins."""
_SIZE = re.compile(r"^(Pss_\w+): +(\d+) kB", re.MULTILINE)
PEER = Path(__file__).with_name("datatrove_peer.py")


@dataclass(frozen=True, slots=True)
class Run:
    """What a process took."""

    seconds: float
    peak_bytes: int
    """Of memory, without mapped files."""
    mapped_bytes: int
    """The most of mapped files that was in memory."""
    written_bytes: int
    """The most that its files, output included, took at once."""
    phase_seconds: dict[str, float]
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
    command = [sys.executable, "-m", "pipeline.stages.prepare", str(data), str(work / "prepare")]
    own = watch(command, work, {phase: work / "prepare.temporary" / name for phase, name in PHASES.items()})
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
    if not sentences:
        raise UserError(f"{texts}: has no sentences to mix; name a folder with text files in English")
    parts = [
        write_documents(data / f"{number}.jsonl", sentences, megabytes / count, seed=number + 1)
        for number in range(count)
    ]
    return Planted(*(sum(getattr(part, name) for part in parts) for name in ("documents", "exact", "near")))


def peer_command(python: str, params: NearDuplicateParams, data: Path, work: Path, workers: int) -> list[str]:
    bands, rows = choose_bands(params.permutations, params.jaccard)
    options = {"workers": workers, "ngram-words": params.ngram_words, "bands": bands, "rows": rows}
    return [python, str(PEER), str(data), str(work), *(f"--{name}={value}" for name, value in options.items())]


def watch(command: list[str], work: Path, phase_files: Mapping[str, Path] = MappingProxyType({})) -> Run:
    """Run a command, and look at its memory and at what it writes in `work`. A phase begins when its file is there."""
    before_bytes = size_of([work])
    peak_bytes = mapped_bytes = written_bytes = 0
    began_s = time.perf_counter()
    phases = {"reading": began_s}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=output, stderr=errors, text=True) as process:
            while process.poll() is None:
                own, mapped = memory_of(process.pid)
                peak_bytes, mapped_bytes = max(peak_bytes, own), max(mapped_bytes, mapped)
                with suppress(FileNotFoundError):  # what is removed meanwhile
                    written_bytes = max(written_bytes, size_of([work]) - before_bytes)
                for phase, file in phase_files.items():
                    if phase not in phases and file.exists():
                        phases[phase] = time.perf_counter()
                time.sleep(WATCH_S)
        ended_s = time.perf_counter()
        for stream in (output, errors):
            stream.seek(0)
        if process.returncode:
            raise UserError(f"{command[1]}: {' '.join(errors.read().split())[-300:]}")
        ends = [*phases.values(), ended_s][1:]
        phase_seconds = {phase: end - start for (phase, start), end in zip(phases.items(), ends, strict=True)}
        return Run(ended_s - began_s, peak_bytes, mapped_bytes, written_bytes, phase_seconds, output.read())


def memory_of(process: int) -> tuple[int, int]:
    """Return the proportional size of a process and its descendants without mapped files, and that of mapped files."""
    own_bytes = mapped_bytes = 0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for one in (parent, *parent.children(recursive=True)):
            with suppress(OSError):  # it has ended
                kilobytes = dict(_SIZE.findall(Path(f"/proc/{one.pid}/smaps_rollup").read_text()))
                own_bytes += 1024 * int(kilobytes["Pss_Anon"])
                mapped_bytes += 1024 * int(kilobytes["Pss_File"])
    return own_bytes, mapped_bytes


def describe(name: str, run: Run, data_bytes: int, found: str) -> str:
    rate = data_bytes / 1e6 / run.seconds
    line = f"{name}: {run.seconds:.0f} s, {rate:.2f} MB/s; memory {run.peak_bytes / 1e6:,.0f} MB, "
    line += f"mapped files {run.mapped_bytes / 1e6:,.0f} MB; "
    line += f"files {run.written_bytes / 1e6:,.0f} MB at once; {found}"
    if len(run.phase_seconds) > 1:
        line += "; seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in run.phase_seconds.items())
    return line


if __name__ == "__main__":
    main()
