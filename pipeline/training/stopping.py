"""When a training ends before its last step: on request (SIGTERM or SIGINT), or because it no longer improves."""

import threading
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.training.processes import Processes


class Stopped(Exception):  # noqa: N818
    """Training stopped on request; the first argument is the last step that it took."""


def is_finished(state: TrainerState, patience: int) -> bool:
    """Return whether training took its last step, or has not improved for `patience` evaluations.

    The answer follows from the losses alone, so that it is the same after an interruption. The untrained base, at step
    0, does not count.
    """
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry and entry["step"] > 0]
    since_best = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    return state.global_step >= state.max_steps or since_best >= patience


class EarlyStopping(TrainerCallback):
    """A callback that ends a training that no longer improves."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= is_finished(state, self.patience)


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
