"""Fine-tune the base on the training split, and open the MLflow run that later stages log under."""

import argparse
import hashlib
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

from pipeline.checkpoint import write_checkpoint
from pipeline.errors import report_errors
from pipeline.files import sha256_file, whole_folder, write_json
from pipeline.imports import PACKAGE, needed_files
from pipeline.params.file import PARAMS_FILE, load_section, read_yaml
from pipeline.params.finetune import FinetuneParams
from pipeline.stage_process import end_with_dvc, termination_noted
from pipeline.tracking import runs, store
from pipeline.training.curves import write_curve
from pipeline.training.precision import supports_bfloat16
from pipeline.training.processes import Processes, join_processes
from pipeline.training.resume import FOLDER, ResumeState, locked, open_state
from pipeline.training.train import summarize, train
from pipeline.training.trainer import Stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path, help="folder of the tokenize stage")
    parser.add_argument("base", type=Path, help="folder of the base stage")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    end_with_dvc()
    with report_errors(), store.store_errors():
        params = load_section("finetune", FinetuneParams)
        processes = join_processes(fsdp=params.fsdp)
        name = fingerprint(arguments.tokens, arguments.base, params, processes.count)
        processes.agree(name, "parameters, data, base, code or libraries")
        # SIGTERM is caught only from here on: a process that waits for the lock has nothing to save.
        if processes.is_first:
            with locked(), termination_noted() as stop:
                train_recorded(arguments.tokens, arguments.base, arguments.out, params, name, processes, stop)
        else:
            with termination_noted() as stop:
                train_along(arguments.tokens, arguments.base, params, name, processes, stop)
        processes.close()


def train_recorded(
    tokens: Path, base: Path, out: Path, params: FinetuneParams, name: str, processes: Processes, stop: threading.Event
) -> None:
    """Fine-tune in the first process: under a run, and with a resume state that is removed at the end."""
    state = open_state(name)
    run_id = run_to_go_on(state)
    with runs.start_run("finetune", read_yaml(PARAMS_FILE), run_id=run_id) as run, exit_when_stopped():
        state.begin(run.run_id)
        finetune(tokens, base, out, params, run, processes, state, stop)
    state.remove()


def train_along(
    tokens: Path, base: Path, params: FinetuneParams, name: str, processes: Processes, stop: threading.Event
) -> None:
    """Fine-tune in every other process: the same training, without recording it."""
    with exit_when_stopped():
        train(tokens, base, params, None, processes, ResumeState(FOLDER / name), stop)


@contextmanager
def exit_when_stopped() -> Iterator[None]:
    """Turn `Stopped` into the exit code of a process that SIGTERM ended."""
    try:
        yield
    except Stopped as stopped:
        print(f"finetune: stopped after step {stopped}; run it again to resume from there", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from stopped


def fingerprint(tokens: Path, base: Path, params: FinetuneParams, processes: int = 1) -> str:
    """Hash all that the weights depend on: data, base, parameters, code, libraries, kind and count of devices."""
    files = [file for folder in (tokens, base) for file in sorted(folder.rglob("*")) if file.is_file()]
    code = needed_files(f"{PACKAGE}.stages.finetune", Path(__file__).parents[2])
    parts = [sha256_file(file) for file in (*files, *sorted(code))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts += [
        params.model_dump_json(),
        torch.__version__,
        transformers.__version__,
        device,
        str(supports_bfloat16()),
        str(processes),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def run_to_go_on(state: ResumeState) -> str | None:
    """Return the run of an interrupted training that has a checkpoint; None if training starts from the base."""
    run_id = state.run_id
    if run_id is None:
        return None
    if not runs.holds_run(run_id):
        print("finetune: the tracking store no longer holds the interrupted run: it starts afresh", file=sys.stderr)
        state.forget()
        return None
    if state.checkpoint is None:
        runs.give_up_run(run_id)
        return None
    return run_id


def finetune(
    tokens: Path,
    base: Path,
    out: Path,
    params: FinetuneParams,
    run: runs.RunLog,
    processes: Processes | None = None,
    state: ResumeState | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Write to `out`: `checkpoint/`, `metrics.json`, the loss curves as CSV, and `run.json`, which names the run.

    `state` holds the checkpoints of the training, which resumes from the newest; without it, an interrupted training
    is lost. Raises `Stopped` if `stop` is set meanwhile.
    """
    with whole_folder(out) as partial:
        work = partial / "work"
        processes = processes or join_processes(fsdp=params.fsdp)
        trained = train(tokens, base, params, run, processes, state or ResumeState(work), stop)
        shutil.rmtree(work, ignore_errors=True)
        write_checkpoint(trained.model, tokenizer_of=base, out=partial / "checkpoint")
        metrics = summarize(trained)
        write_json(partial / "metrics.json", metrics)
        write_curve(partial / "loss_train.csv", trained.curves.train)
        write_curve(partial / "loss_validation.csv", trained.curves.validation)
        write_json(partial / "run.json", {"run_id": run.run_id})
        run.log_scores("final", metrics)


if __name__ == "__main__":
    main()
