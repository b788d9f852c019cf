"""Fine-tune the base on the training split; the MLflow run that it opens is what later stages log under."""

import argparse
import csv
import hashlib
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import GPT2LMHeadModel, logging, set_seed

from pipeline.checkpoint import write_checkpoint
from pipeline.errors import UserError, report_errors
from pipeline.files import sha256_file, whole_file, whole_folder, write_json
from pipeline.imports import PACKAGE, needed_files
from pipeline.params.file import PARAMS_FILE, load_section, read_yaml
from pipeline.params.finetune import FinetuneParams, TrainingSamplesParams
from pipeline.stage_process import end_with_dvc, termination_noted
from pipeline.tokens import TokenArrays, load_tokenizer, load_tokens, tokenizer_sha256
from pipeline.tracking import lineage, runs, store
from pipeline.training.memory import parts_of_step
from pipeline.training.model import gathered, load_trainable, trained_gpt2
from pipeline.training.packing import PackedSteps
from pipeline.training.precision import supports_bfloat16
from pipeline.training.processes import Processes, join_processes
from pipeline.training.resume import FOLDER, ResumeState, locked, open_state
from pipeline.training.samples import generate_samples, score_samples
from pipeline.training.trainer import Curves, Stopped, finetune_model


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
        processes = join_processes()
        name = fingerprint(arguments.tokens, arguments.base, params, processes.count)
        processes.agree(name, "parameters, data, base, code or libraries")
        # Noted from here on only: one that waits for the lock has nothing to save.
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
    """What the first process does: fine-tune under a run, and keep the state of it until it has ended."""
    state = open_state(name)
    run_id = run_to_go_on(state)
    with runs.start_run("finetune", read_yaml(PARAMS_FILE), run_id=run_id) as run, stop_told():
        state.begin(run.run_id)
        finetune(tokens, base, out, params, run, processes, state, stop)
    state.remove()


def train_along(
    tokens: Path, base: Path, params: FinetuneParams, name: str, processes: Processes, stop: threading.Event
) -> None:
    """What every other process does: the same training, of which it records nothing."""
    with stop_told():
        train(tokens, base, params, None, processes, ResumeState(FOLDER / name), stop)


@contextmanager
def stop_told() -> Iterator[None]:
    try:
        yield
    except Stopped as stopped:
        print(f"finetune: stopped after step {stopped}; run it again to go on from there", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from stopped


def fingerprint(tokens: Path, base: Path, params: FinetuneParams, processes: int = 1) -> str:
    """A name for all that the weights depend on: data, base, parameters, code, libraries, kind and count of devices."""
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
    """The run of an interrupted training with a checkpoint to go on from; none where it begins anew."""
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
    """Write to `out`: `checkpoint/`, `metrics.json`, the loss curves as CSV and `run.json`, which names the run.

    Checkpoints of the training lie in `state`, and it goes on from the newest; without it an interrupted training is
    lost. Raises `Stopped` where `stop` is set meanwhile.
    """
    with whole_folder(out) as partial:
        work = partial / "work"
        trained = train(tokens, base, params, run, processes or join_processes(), state or ResumeState(work), stop)
        shutil.rmtree(work, ignore_errors=True)
        write_checkpoint(trained.model, tokenizer_of=base, out=partial / "checkpoint")
        metrics = summarize(trained)
        write_json(partial / "metrics.json", metrics)
        write_curve(partial / "loss_train.csv", trained.curves.train)
        write_curve(partial / "loss_validation.csv", trained.curves.validation)
        write_json(partial / "run.json", {"run_id": run.run_id})
        run.log_scores("final", metrics)


@dataclass(frozen=True)
class Trained:
    """What training gives."""

    model: GPT2LMHeadModel
    curves: Curves
    steps: PackedSteps


def train(
    tokens: Path,
    base: Path,
    params: FinetuneParams,
    run: runs.RunLog | None,
    processes: Processes,
    state: ResumeState,
    stop: threading.Event | None,
) -> Trained:
    """Fine-tune in each of the `processes`; the first of them records it in `run`, which the others do not have."""
    tokenizer = load_tokenizer(base)
    splits = {name: load_tokens(tokens / name, tokenizer_sha256(base)) for name in ("train", "validation")}
    check_fsdp(params, processes)
    fix_randomness(params.seed)
    model = load_trainable(base, params)
    context_length = window_length(params, model.config.n_positions)
    check_vocabulary(splits["train"], model.config.vocab_size)
    model.to(processes.device)
    parts = processes.from_first(
        lambda: state.parts_of_step(
            lambda: parts_of_step(model, params, context_length=context_length, processes=processes.count)
        )
    )
    sizes = {"context_length": context_length, "batch_tokens": params.batch_tokens, "parts": parts}
    steps = PackedSteps(splits["train"], epochs=params.epochs, seed=params.seed, share=params.train_share, **sizes)
    validation = PackedSteps(splits["validation"], **sizes)
    if run is not None:
        for name, arrays in splits.items():
            log_split(run, name, arrays, tokens)
        precision = "bfloat16" if supports_bfloat16() else "float32"
        run.set_tags({"finetune.precision": precision, "finetune.batches_a_step": str(parts)})

    def on_evaluation(model: GPT2LMHeadModel, step: int) -> None:
        # In every process, as the weights may be spread over all.
        samples = generate_samples(model, tokenizer, params.samples)
        if run is not None:
            log_samples(run, step, samples, score_samples(samples, tokenizer, splits["train"].tokens), params.samples)

    curves = finetune_model(
        model,
        steps,
        validation,
        params,
        processes=processes,
        work_folder=state.folder,
        log=run,
        on_evaluation=on_evaluation,
        resume_from=processes.from_first(lambda: state.checkpoint),
        stop=stop,
    )
    if params.fsdp:
        model = gathered(model, load_trainable(base, params))
    return Trained(trained_gpt2(model), curves, steps)


def log_samples(
    run: runs.RunLog,
    step: int,
    samples: list[dict[str, str]],
    scores: list[dict[str, float]],
    params: TrainingSamplesParams,
) -> None:
    """A row a sample, and over all of them how much they repeat, and the longest copy from the training text."""
    if not samples:
        return
    metrics = {
        "samples_rep_4": sum(score["rep_4"] for score in scores) / len(scores),
        "samples_longest_copy_tokens": max(score["longest_copy_tokens"] for score in scores),
    }
    run.log_metrics(metrics, step)
    if step == 0 or not run.holds_row("samples.json", "step", step):
        decoding = params.model_dump(exclude={"prompts"})
        rows = [{"step": step, **sample, **score, **decoding} for sample, score in zip(samples, scores, strict=True)]
        run.log_table("samples.json", rows)


def fix_randomness(seed: int) -> None:
    """Seed every generator; on a GPU also choose the kernels that give the same sums each time."""
    set_seed(seed)
    if torch.cuda.is_available():
        # cuBLAS reads it when it starts: a workspace of fixed size keeps it from choosing among streams.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def check_vocabulary(tokens: TokenArrays, vocabulary: int) -> None:
    """Raise `UserError` where the tokens are not all of the model's vocabulary."""
    if tokens.vocabulary_size > vocabulary:
        raise UserError(
            f"the tokens are of a vocabulary of {tokens.vocabulary_size}, and the base's holds {vocabulary}; "
            "make both anew with dvc repro"
        )


def check_fsdp(params: FinetuneParams, processes: Processes) -> None:
    """Raise `UserError` where weights cannot be shared among processes as they are."""
    if not params.fsdp:
        return
    if processes.device.type != "cuda" or processes.count == 1:
        raise UserError(
            "finetune.fsdp: shares weights among GPUs, one a process; start the stage with torchrun, or set it to false"
        )
    if params.optimizer == "muon":
        raise UserError("finetune.optimizer: muon takes whole matrices, and finetune.fsdp shares them; set adamw")


def window_length(params: FinetuneParams, positions: int) -> int:
    """Tokens of a window. Raises `UserError` where the base has fewer positions."""
    if params.context_length is None:
        return positions
    if params.context_length > positions:
        raise UserError(
            f"finetune.context_length: {params.context_length} is more than the base's {positions} positions; "
            "lower it, or set it to null for all of them"
        )
    return params.context_length


def log_split(run: runs.RunLog, name: str, arrays: TokenArrays, tokens: Path) -> None:
    data_md5 = lineage.dvc_md5("data")
    source = {"split": name, "documents": str(len(arrays)), "tokens": str(len(arrays.tokens))}
    run.log_dataset(name, arrays.sha256[:36], source | ({"dvc.data_md5": data_md5} if data_md5 else {}))


def summarize(trained: Trained) -> dict[str, float]:
    """What `dvc metrics` compares: losses in nats a token; nothing that differs between two runs of the same commit."""
    curves = trained.curves
    best_step, best_loss = curves.best_validation
    return {
        "train_loss": curves.train[-1][1],
        "validation_loss": best_loss,
        "validation_perplexity": math.exp(best_loss),
        "base_validation_loss": curves.validation[0][1],
        "best_step": best_step,
        "steps": curves.validation[-1][0],
        "train_tokens": trained.steps.window_tokens,
    }


def write_curve(path: Path, points: list[tuple[int, float]]) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows(points)


if __name__ == "__main__":
    main()
