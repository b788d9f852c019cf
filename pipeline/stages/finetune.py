"""Fine-tune the base on the training split, and open the MLflow run that later stages log under."""

import argparse
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import logging

from pipeline import resume
from pipeline.checkpoint import write_checkpoint
from pipeline.curves import write_curve
from pipeline.errors import report_errors
from pipeline.files import whole_folder, write_json
from pipeline.params.file import load_section
from pipeline.params.finetune import FinetuneParams
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.stage_process import end_with_dvc, note_termination
from pipeline.tracking.records import record_finetuning
from pipeline.tracking.runs import RunLog, start_run
from pipeline.tracking.store import store_errors
from pipeline.training.precision import supports_bfloat16
from pipeline.training.processes import Processes, join_processes
from pipeline.training.state import TrainingState, open_state
from pipeline.training.stopping import Stopped
from pipeline.training.train import summarize, train

STAGE = "finetune"
COMPARED = ("base_validation_loss", "validation_loss")
"""The figures by which experiments are compared; all others are details."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path, help="folder of the tokenize stage")
    parser.add_argument("base", type=Path, help="folder of the base stage")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    end_with_dvc()
    with report_errors(), store_errors():
        params = load_section("finetune", FinetuneParams)
        processes = join_processes(fsdp=params.fsdp)
        name = fingerprint(arguments.tokens, arguments.base, params, processes.count)
        processes.agree(name, "parameters, data, base, code or libraries")
        if not processes.from_first(lambda: resume.holds_outputs(STAGE, name, arguments.out)):
            # Signals are caught only from here on: a process that waits for the lock has nothing to save.
            if processes.is_first:
                with resume.only_resumer(STAGE), note_termination() as stop, exit_when_stopped():
                    train_recorded(arguments.tokens, arguments.base, arguments.out, params, name, processes, stop)
            else:
                with note_termination() as stop, exit_when_stopped():
                    # The same training as in the first process, without recording it.
                    state = TrainingState(resume.RESUME_FOLDER / STAGE / name)
                    train(arguments.tokens, arguments.base, params, None, processes, state, stop)
        processes.close()


def fingerprint(tokens: Path, base: Path, params: FinetuneParams, processes: int = 1) -> str:
    """Return the name of a training: a digest of data, base, parameters, code, libraries, kind and count of devices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = (torch.__version__, transformers.__version__)
    facts = (params.model_dump_json(), *versions, device, str(supports_bfloat16()), str(processes))
    return resume.fingerprint(STAGE, (tokens, base), *facts)


def train_recorded(
    tokens: Path, base: Path, out: Path, params: FinetuneParams, name: str, processes: Processes, stop: threading.Event
) -> None:
    """Fine-tune under a run, which an interrupted training resumes; its state is removed at the end."""
    folder = resume.open_folder(STAGE, name)
    run_id = resume.interrupted_run(STAGE, folder)
    state = open_state(folder)
    parameters = read_yaml(PARAMS_FILE)
    with start_run(STAGE, parameters, run_id=run_id, fingerprint=name) as run:
        resume.note_run(folder, run.run_id)
        finetune(tokens, base, out, params, run, processes, state, stop)
        record_finetuning(run, out, parameters)
    resume.remove(folder)


@contextmanager
def exit_when_stopped() -> Iterator[None]:
    """Turn `Stopped` into the exit code of a process that SIGTERM ended, whatever asked for it."""
    try:
        yield
    except Stopped as stopped:
        print(f"finetune: stopped after step {stopped}; run it again to resume from there", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from stopped


def finetune(
    tokens: Path,
    base: Path,
    out: Path,
    params: FinetuneParams,
    run: RunLog,
    processes: Processes | None = None,
    state: TrainingState | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Write to `out`: `checkpoint/`, `metrics.json`, `details.json`, and the loss curves as CSV.

    `state` holds the checkpoints of the training, which resumes from the newest; without it, an interrupted training
    is lost. Raises `Stopped` if `stop` is set meanwhile.
    """
    with whole_folder(out) as partial:
        work = partial / "work"
        processes = processes or join_processes(fsdp=params.fsdp)
        trained = train(tokens, base, params, run, processes, state or TrainingState(work), stop)
        shutil.rmtree(work, ignore_errors=True)
        write_checkpoint(trained.model, tokenizer_of=base, out=partial / "checkpoint")
        details = summarize(trained)
        write_json(partial / "details.json", details)
        write_json(partial / "metrics.json", {name: details[name] for name in COMPARED})
        write_curve(partial / "loss_train.csv", trained.curves.train)
        write_curve(partial / "loss_validation.csv", trained.curves.validation)


if __name__ == "__main__":
    main()
