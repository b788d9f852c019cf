"""Stopping a training on request (SIGTERM): it finishes the step, saves a checkpoint, and raises `Stopped`."""

import threading
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.training.processes import Processes


class Stopped(Exception):  # noqa: N818
    """Training stopped on request; the first argument is the last step that it took."""


class StopCallback(TrainerCallback):
    """A callback that saves and stops after the current step if a stop was requested in any process."""

    def __init__(self, stop: threading.Event, processes: Processes) -> None:
        self.stop = stop
        self.processes = processes

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.processes.any(self.stop.is_set()):
            control.should_save = control.should_training_stop = True
        return control
