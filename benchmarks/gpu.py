"""Try what needs a GPU, step by step, and write one file: what ran, how fast, what was predicted, and what failed.

A step has at most eight minutes. If it fails, crashes or takes longer, the file holds the last lines of its output, and
the next step runs. The file is written after each step. Only the first GPU is used, and no network. Exit codes: 0 if
all steps passed, 1 if one failed, 2 without a GPU, 130 if interrupted.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

# The project may not be installed here.
sys.path.insert(0, str(Path(__file__).parents[1]))

from contenders import PEER_LIBRARIES

from pipeline import machine
from pipeline.engine.cuda import driver
from pipeline.errors import UserError, report_errors
from pipeline.files import whole_file
from pipeline.stage_process import note_termination

ROOT = Path(__file__).parents[1]
PREDICTIONS = ROOT / "docs" / "gpu.md"
KEPT_LINES = 150
"""The most lines of a step's output that the file holds: the longest report is of 120."""
LIBRARIES = (
    *("accelerate", "peft", "triton"),
    *("nvidia-cuda-runtime", "nvidia-cublas", "nvidia-cudnn-cu13"),
    *PEER_LIBRARIES,
)
POLL_S = 0.2
PASSED, INTERRUPTED = "passed", "interrupted"


@dataclass(frozen=True)
class Step:
    """What runs in the processes of one step."""

    name: str
    commands: Sequence[Sequence[str]]
    """The arguments of Python, for each command; all run in one temporary folder."""
    figures: Mapping[str, str]
    """The patterns that find figures in the output, each with one group, by the names in docs/gpu.md. A step without
    one of its figures has failed."""
    limit_s: float = 480.0


def script(name: str, *arguments: str) -> list[str]:
    return [str(Path(__file__).with_name(name)), *arguments]


def gpu_tests() -> list[str]:
    """Return the files with tests for a GPU. Others may import what is not installed here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def decoded(batch: int) -> str:
    """Return the pattern of the engine's new tokens per second in the table for a batch size."""
    return rf"^Batch {batch}, .*\n(?:.+\n)*?engine-float16 +16 +([\d.,]+)"


DECODING = ("--batch", "1,8,64", "--contexts", "448", "--new-tokens", "128", "--rounds", "3")
"""The cache then holds 512 tokens per row on average."""
TRAINING = ("--context", "1024", "--blocks", "16", "--steps", "30", "--rounds", "2", "--documents", "8")
STEPS = (
    Step(
        "doctor",
        [["-m", "pipeline", "doctor"]],
        {
            "CUDA, according to `doctor`": r"^cuda +(runs)$",
            "GB/s of the GPU's memory, read and written": r"^gpu bandwidth +([\d,]+) GB/s",
        },
    ),
    Step(
        "tests",
        [["-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-m", "gpu", "-rs", *gpu_tests()]],
        {"GPU tests that pass, if none is skipped": r"^=+ (?!.*skipped)(\d+) passed"},
    ),
    Step(
        "decode",
        [script("decode.py", "--provider", "cuda", *DECODING, "--work", "decode")],
        {f"new tokens per second, batch {batch}": decoded(batch) for batch in (1, 8, 64)},
    ),
    Step(
        "finetune",
        [
            script("tales.py", "tales", "--until", "tokenize"),
            script("finetune.py", "--tokens", "tales/out/tokenize", *TRAINING),
        ],
        {
            "fine-tuned tokens per second": r"^ours +([\d.]+)",
            "share of the GPU's peak in fine-tuning": r"^ours +[\d.]+ +([\d.]+%)",
        },
    ),
    Step(
        "pipeline",
        [script("tales.py", "tales")],
        {
            "provider and precision of `evaluate`": r"^evaluated on (\w+ in \w+):",
            "bits per byte of the tales": r"^evaluated on .*: ([\d.]+) bits per byte",
        },
    ),
)


@dataclass(frozen=True)
class Result:
    """What became of a step."""

    step: Step
    outcome: str
    """`passed`, or what went wrong."""
    seconds: float
    figures: Mapping[str, str]
    output: str
    """The commands, each with a dollar sign, and the last lines of what they printed."""

    @property
    def has_passed(self) -> bool:
        return self.outcome == PASSED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"the steps to run (default: {' '.join(names)})")
    default = ROOT / "benchmarks" / "results" / "gpu.txt"
    parser.add_argument("--out", type=Path, default=default, help="default: benchmarks/results/gpu.txt")
    arguments = parser.parse_args()
    with report_errors():
        if unknown := sorted(set(arguments.steps) - set(names)):
            raise UserError(f"steps: {unknown[0]!r} is none of {', '.join(names)}")
        check_gpu()
        steps = [step for step in STEPS if step.name in (arguments.steps or names)]
        with note_termination() as stop:
            results = run_steps(steps, arguments.out, stop)
        if stop.is_set():
            raise KeyboardInterrupt
    raise SystemExit(not all(result.has_passed for result in results))


def check_gpu() -> None:
    """Raise `UserError` if there is no GPU; whether everything else is there is for the first step to say."""
    library = driver.driver()
    if library is None:
        raise UserError("no GPU here: no NVIDIA driver (libcuda) is installed")
    if code := library.cuInit(0):
        raise UserError(f"no GPU here: the NVIDIA driver offers none (error {code}); see what nvidia-smi says")


def run_steps(steps: Sequence[Step], out: Path, stop: threading.Event) -> list[Result]:
    """Run the steps and write the file after each. Once `stop` is set, the current step ends, and no other begins."""
    facts = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **describe()}
    results: list[Result] = []
    print(f"after each step, {out} has its result", flush=True)
    for number, step in enumerate(steps, start=1):
        print(f"{number} of {len(steps)}: {step.name} (at most {minutes(step.limit_s)})", flush=True)
        with tempfile.TemporaryDirectory(prefix=f"gpu-{step.name}-") as folder:
            results.append(run_step(step, Path(folder).resolve(), stop))
        write(out, facts, results)
        print(f"   {minutes(results[-1].seconds)}, {results[-1].outcome}", flush=True)
        if stop.is_set():
            break
    return results


def run_step(step: Step, folder: Path, stop: threading.Event) -> Result:
    """Run the commands of a step, until one fails or the time is over."""
    log, outcome, began = folder / f"{step.name}.log", PASSED, time.monotonic()
    with log.open("wb") as output:
        for command in step.commands:
            output.write(f"$ python {shlex.join(command)}\n".encode())
            output.flush()
            outcome = run_command(command, folder, output.fileno(), began + step.limit_s, stop)
            if outcome != PASSED:
                break
    seconds = time.monotonic() - began
    # As bytes, so that returns within a line are not taken for line ends.
    text = log.read_bytes().decode(errors="replace")
    found = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in step.figures.items()}
    figures = {name: match[1] for name, match in found.items() if match}
    if outcome == PASSED and (missing := [name for name in found if name not in figures]):
        outcome = f"failed: its output does not have: {'; '.join(missing)}"
    return Result(step, outcome, seconds, figures, shorten(text, folder))


def run_command(command: Sequence[str], folder: Path, output: int, end_s: float, stop: threading.Event) -> str:
    """Run Python until `end_s` of the monotonic clock, and return how it ended; all that it started ends with it."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        while (code := process.poll()) is None:
            if stop.wait(POLL_S):
                return INTERRUPTED
            if time.monotonic() > end_s:
                return "failed: took too long"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code < 0:
        return f"failed: ended by {signal.Signals(-code).name}"
    return PASSED if code == 0 else f"failed: exit code {code}"


def environment() -> dict[str, str]:
    """Return an environment with this code, without a network, and with one GPU."""
    return {
        "CUDA_VISIBLE_DEVICES": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }


def shorten(text: str, folder: Path) -> str:
    """Return the commands and the last lines of an output, without this machine's paths and overwritten lines."""
    for path in (folder, ROOT, Path(sys.prefix)):
        # pytest shows paths relative to the folder in which it runs.
        text = re.sub(rf"(/|(\.\./)+){re.escape(str(path).lstrip('/'))}/", "", text)
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    early, late = lines[:-KEPT_LINES], lines[-KEPT_LINES:]
    commands = [line for line in early if line.startswith("$ ")]
    return "\n".join([*commands, *(["..."] if early else []), *late]).rstrip()


def describe() -> dict[str, str]:
    """Return machine, GPU and versions as the lines of a table."""
    gpu = "nvidia-smi is not installed"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpu = "; ".join(subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines())
    return {"gpu": gpu, **machine.describe(LIBRARIES)}


def write(out: Path, facts: Mapping[str, str], results: Sequence[Result]) -> None:
    """Write the file: machine, outcomes, figures, and the end of each output."""
    figures = {name: value for result in results for name, value in result.figures.items()}
    parts = [
        "What needs a GPU, tried on one",
        table(list(facts.items())),
        table([(result.step.name, minutes(result.seconds), result.outcome) for result in results]),
        table(
            [
                ("figure", "predicted for an H200", "measured"),
                *((name, predicted, figures.get(name, "-")) for name, predicted in predictions().items()),
            ]
        ),
        *(f"== {result.step.name}: {result.outcome}\n{result.output}" for result in results),
    ]
    with whole_file(out) as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def predictions() -> dict[str, str]:
    """Return what docs/gpu.md predicts, by the names of the figures."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", PREDICTIONS.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows[2:])


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def minutes(seconds: float) -> str:
    """Return a duration as minutes and seconds."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02} min"


if __name__ == "__main__":
    main()
