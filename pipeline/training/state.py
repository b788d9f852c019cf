"""The state of an unfinished training: whole checkpoints with all that resuming from one needs, in a folder."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import read_json, write_json

PARTS_FILE = "parts.json"
STEP_LOSSES_FILE = "step_losses.json"
"""The file in a checkpoint with the losses of the steps since the last point of the training curve."""
WHOLE_FILE = "whole"
"""The file that marks a checkpoint as whole: it is written last."""


@dataclass(frozen=True)
class TrainingState:
    """The state of one fine-tuning, new or interrupted."""

    folder: Path

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint; None if there is none."""
        whole = [file.parent for file in self.folder.glob(f"checkpoint-*/{WHOLE_FILE}")]
        return max(whole, key=step_of, default=None)

    def make_room(self, best: str | None) -> None:
        """Remove all whole checkpoints but the best, or but the newest if there is no best, before another is written.

        Then there are never more than two, and one of them is whole.
        """
        kept = self.checkpoint if best is None else self.folder / Path(best).name
        for mark in self.folder.glob(f"checkpoint-*/{WHOLE_FILE}"):
            if mark.parent != kept:
                # First, so that a checkpoint that is only partly removed does not count as whole.
                mark.unlink()
                shutil.rmtree(mark.parent)

    def parts_of_step(self, choose: Callable[[], int]) -> int:
        """Return the batches per step: those before an interruption, since sums round differently, or as chosen now."""
        file = self.folder / PARTS_FILE
        if not file.is_file():
            write_json(file, {"parts_of_step": choose()})
        return int(read_json(file)["parts_of_step"])


def open_state(folder: Path) -> TrainingState:
    """Return the state in `folder`, without checkpoints that are not whole; say what is resumed."""
    state = TrainingState(folder)
    for torn in sorted(folder.glob("checkpoint-*")):
        if not (torn / WHOLE_FILE).is_file():
            print(f"finetune: {torn} is not whole, and is removed", file=sys.stderr)
            shutil.rmtree(torn)
    if (checkpoint := state.checkpoint) is not None:
        print(f"finetune: resuming from step {step_of(checkpoint)} of the interrupted fine-tuning", file=sys.stderr)
    return state


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])
