"""A contender in its own process, so that its memory and start-up time can be measured; both ends of the pipe.

The parent writes one request per line as JSON and reads one answer per line. A worker that fails exits, and the last
line of its log is the reason.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from contenders import GREEDY, MODULES, SAMPLED, Contender, parse_contender
from conversion import ROOT, last_line

from pipeline.errors import UserError

FIRST_PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)
"""The prompt that is continued by one token once the model is loaded."""


@dataclass(frozen=True)
class Start:
    """The start of a contender; times in seconds since its process was started."""

    imported_s: float
    first_token_s: float
    build: str
    peak_bytes: int


@dataclass(frozen=True)
class Answer:
    """The new tokens of each row, the time they took, and the peak of memory meanwhile."""

    token_ids: list[list[int]]
    seconds: float
    peak_bytes: int


class Worker:
    """The parent's end. Every method raises `UserError` with the reason if the process has ended."""

    def __init__(self, contender: Contender, folder: Path, threads: int, log: Path) -> None:
        self.contender = contender
        self._log = log
        for file in sorted(folder.rglob("*")):
            # Bring the files into the page cache, as for every other contender.
            if file.is_file():
                read_through(file)
        started = time.time()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, __file__, contender.name, contender.provider),
                    *(str(folder.resolve()), str(threads), repr(started)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(threads),
            )
        self.start = Start(**self._answer())

    def cpu_seconds(self) -> float:
        """Return the processor time that the contender has used."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, room: int, greedy: bool = False) -> Answer:
        """Continue each prompt by exactly `new_tokens`, in rows of at most `room` tokens."""
        request = {"prompts": prompts, "new_tokens": new_tokens, "room": room, "greedy": greedy}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise UserError(self._reason()) from None
        answer = Answer(**self._answer())
        counts = [len(row) for row in answer.token_ids]
        if counts != [new_tokens] * len(prompts):
            raise UserError(f"gave {counts} tokens instead of {new_tokens} per row")
        return answer

    def stop(self) -> None:
        """Kill the process; it holds nothing worth keeping."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise UserError(self._reason())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reason(self) -> str:
        code = self._process.wait()
        return f"{last_line(self._log.read_text(errors='replace'))} (exit code {code})".strip()


def environment(threads: int) -> dict[str, str]:
    """Return an environment that gives every library the same number of threads, and no network."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }


def reset_peak_memory() -> None:
    """Restart the high-water mark of this process's memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(process: int | str = "self") -> int:
    """Return the most bytes that a process held in memory since its last reset, mapped files included."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def read_through(file: Path) -> None:
    with file.open("rb", buffering=0) as content:
        while content.read(2**24):
            pass


def main() -> None:
    """Run the worker: load, answer with `Start`, then answer every request with `Answer`."""
    name, provider, folder, threads, started = sys.argv[1:]
    # Libraries print to standard output; send that to the log, with their errors.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = parse_contender(name, provider)
    for module in MODULES[contender.family]:
        importlib.import_module(module)
    imported_s = time.time() - float(started)
    from runners import load_runner

    runner = load_runner(contender, Path(folder), int(threads))
    runner.reserve(1, len(FIRST_PROMPT) + 1)
    runner.generate([FIRST_PROMPT], 1, SAMPLED, seed=0)
    first_token_s = time.time() - float(started)
    start = Start(imported_s, first_token_s, runner.build, peak_memory())
    print(json.dumps(asdict(start)), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts, new_tokens = request["prompts"], request["new_tokens"]
        runner.reserve(len(prompts), request["room"])
        # While it was idle, its threads may have gone to sleep and mapped files been dropped: one token wakes them up.
        runner.generate([prompt[-len(FIRST_PROMPT) :] for prompt in prompts], 1, SAMPLED, seed=0)
        reset_peak_memory()
        begun = time.perf_counter()
        token_ids = runner.generate(prompts, new_tokens, GREEDY if request["greedy"] else SAMPLED, seed=1)
        seconds = time.perf_counter() - begun
        answer = Answer(token_ids, seconds, peak_memory())
        print(json.dumps(asdict(answer)), file=answers, flush=True)


if __name__ == "__main__":
    main()
