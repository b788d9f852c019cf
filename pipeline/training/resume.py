"""What an interrupted fine-tuning goes on from: whole checkpoints with all state, beside DVC's outputs, not among them.

DVC removes the outputs of a stage before it runs, and would hash what lies there. So the state lies in a folder of its
own, ignored by git, named by a fingerprint of all that training depends on: under another fingerprint it is of no use,
and is removed. It holds the id of the MLflow run, so that the curves go on where they were.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import read_json, write_json
from pipeline.stage_process import only_writer

FOLDER = Path(".resume") / "finetune"
LOCK_WAIT_S = 60
"""For one that was told to stop, and saves where it is."""
RUN_FILE = "run.json"
PARTS_FILE = "parts.json"
WHOLE_FILE = "whole"
"""In a checkpoint of which every file was written; one without it was cut off."""


@dataclass(frozen=True)
class ResumeState:
    """The state of one fine-tuning, begun or to be begun."""

    folder: Path

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        whole = [file.parent for file in self.folder.glob(f"checkpoint-*/{WHOLE_FILE}")]
        return max(whole, key=step_of, default=None)

    @property
    def run_id(self) -> str | None:
        """The run that recorded it so far."""
        file = self.folder / RUN_FILE
        return str(read_json(file)["run_id"]) if file.is_file() else None

    def begin(self, run_id: str) -> None:
        """Note the run that records it from now on."""
        write_json(self.folder / RUN_FILE, {"run_id": run_id})

    def parts_of_step(self, choose: Callable[[], int]) -> int:
        """Into how many batches each step is cut: as before, since sums would round otherwise, or as chosen now."""
        file = self.folder / PARTS_FILE
        if not file.is_file():
            write_json(file, {"parts_of_step": choose()})
        return int(read_json(file)["parts_of_step"])

    def forget(self) -> None:
        """Remove all of it, and start from the base."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def remove(self) -> None:
        """Training has ended, and its outputs are in their place."""
        shutil.rmtree(self.folder)


@contextmanager
def locked() -> Iterator[None]:
    """Keep a second fine-tuning out of this project's folder. Raises `UserError` where one goes on."""
    with only_writer(FOLDER, LOCK_WAIT_S):
        yield


def open_state(fingerprint: str) -> ResumeState:
    """The state of this fingerprint; says what it cannot use, and removes it."""
    state = ResumeState(FOLDER / fingerprint)
    state.folder.mkdir(parents=True, exist_ok=True)
    for other in FOLDER.iterdir():
        if other != state.folder:
            _tell("data, base, parameters or code have changed since the interrupted fine-tuning: it starts afresh")
            shutil.rmtree(other)
    for torn in sorted(state.folder.glob("checkpoint-*")):
        if not (torn / WHOLE_FILE).is_file():
            _tell(f"{torn} was cut off while it was written, and is left out")
            shutil.rmtree(torn)
    if (checkpoint := state.checkpoint) is not None:
        _tell(f"going on from step {step_of(checkpoint)} of the interrupted fine-tuning")
    return state


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])


def _tell(line: str) -> None:
    print(f"finetune: {line}", file=sys.stderr)
