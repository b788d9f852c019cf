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
from pathlib import Path

import torch
import transformers
from transformers import GPT2LMHeadModel, logging, set_seed

from pipeline import tracking
from pipeline.checkpoint import attention_implementation, save_model
from pipeline.errors import UserError, reported
from pipeline.files import sha256_file, whole_file, whole_folder, write_json
from pipeline.imports import PACKAGE, needed_files
from pipeline.params import PARAMS_FILE, FinetuneParams, load_params, read_yaml
from pipeline.process import end_with_dvc, termination_noted
from pipeline.tokens import TOKENIZER_FILES, TokenArrays, load_tokenizer, load_tokens, tokenizer_sha256
from pipeline.training.packing import PackedRows
from pipeline.training.resume import ResumeState, locked, open_state
from pipeline.training.samples import generate_samples
from pipeline.training.trainer import Curves, Stopped, finetune_model, supports_bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path, help="folder of the tokenize stage")
    parser.add_argument("base", type=Path, help="folder of the base stage")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    end_with_dvc()
    with reported(), tracking.store_errors(), locked(), termination_noted() as stop:
        params = load_params().finetune
        state = open_state(fingerprint(arguments.tokens, arguments.base, params))
        run_id = run_to_go_on(state)
        with tracking.start_run("finetune", read_yaml(PARAMS_FILE), run_id=run_id) as run:
            state.begin(run.run_id)
            try:
                finetune(arguments.tokens, arguments.base, arguments.out, params, run, state, stop)
            except Stopped as stopped:
                print(f"finetune: stopped after step {stopped}; run it again to go on from there", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM) from stopped
        state.remove()


def fingerprint(tokens: Path, base: Path, params: FinetuneParams) -> str:
    """A name for all that the weights depend on: data, base, parameters, code, libraries, kind of device."""
    files = [file for folder in (tokens, base) for file in sorted(folder.rglob("*")) if file.is_file()]
    code = needed_files(f"{PACKAGE}.stages.finetune", Path(__file__).parents[2])
    parts = [sha256_file(file) for file in (*files, *sorted(code))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts += [params.model_dump_json(), torch.__version__, transformers.__version__, device, str(supports_bfloat16())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def run_to_go_on(state: ResumeState) -> str | None:
    """The run of an interrupted training with a checkpoint to go on from; none where it begins anew."""
    run_id = state.run_id
    if run_id is None:
        return None
    if not tracking.holds_run(run_id):
        print("finetune: the tracking store no longer holds the interrupted run: it starts afresh", file=sys.stderr)
        state.forget()
        return None
    if state.checkpoint is None:
        tracking.give_up_run(run_id)
        return None
    return run_id


def finetune(
    tokens: Path,
    base: Path,
    out: Path,
    params: FinetuneParams,
    run: tracking.RunLog,
    state: ResumeState | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Write to `out`: `checkpoint/`, `metrics.json`, the loss curves as CSV and `run.json`, which names the run.

    Checkpoints of the training lie in `state`, and it goes on from the newest; without it an interrupted training is
    lost. Raises `Stopped` where `stop` is set meanwhile.
    """
    tokenizer = load_tokenizer(base)
    splits = {name: load_tokens(tokens / name, tokenizer_sha256(base)) for name in ("train", "validation")}
    fix_randomness(params.seed)
    model = load_base(base, dropout=params.dropout, attention_dropout=params.attention_dropout)
    context_length = window_length(params, model.config.n_positions)
    rows = {
        name: PackedRows(arrays, context_length=context_length, row_tokens=params.row_tokens)
        for name, arrays in splits.items()
    }
    for name, arrays in splits.items():
        log_split(run, name, arrays, tokens)
    run.set_tags({"finetune.precision": "bfloat16" if supports_bfloat16() else "float32"})

    def log_samples(model: GPT2LMHeadModel, step: int) -> None:
        if step > 0 and run.holds_row("samples.json", "step", step):
            return
        decoding = params.samples.model_dump(exclude={"prompts"})
        samples = generate_samples(model, tokenizer, params.samples)
        run.log_table("samples.json", [{"step": step, **sample, **decoding} for sample in samples])

    with whole_folder(out) as partial:
        curves = finetune_model(
            model,
            rows["train"],
            rows["validation"],
            params,
            end_of_text_id=splits["train"].end_of_text_id,
            work_folder=partial / "work" if state is None else state.folder,
            log=run,
            on_evaluation=log_samples,
            resume_from=None if state is None else state.checkpoint,
            stop=stop,
        )
        shutil.rmtree(partial / "work", ignore_errors=True)
        write_checkpoint(model, base, partial / "checkpoint")
        metrics = summarize(curves, rows["train"], splits["train"])
        write_json(partial / "metrics.json", metrics)
        write_curve(partial / "loss_train.csv", curves.train)
        write_curve(partial / "loss_validation.csv", curves.validation)
        write_json(partial / "run.json", {"run_id": run.run_id})
        run.log_scores("final", metrics)


def fix_randomness(seed: int) -> None:
    """Seed every generator; on a GPU also choose the kernels that give the same sums each time."""
    set_seed(seed)
    if torch.cuda.is_available():
        # cuBLAS reads it when it starts: a workspace of fixed size keeps it from choosing among streams.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def load_base(base: Path, *, dropout: float | None, attention_dropout: float | None) -> GPT2LMHeadModel:
    """The base's model in float32, with the dropout rates that are given in place of its own."""
    rates = {"embd_pdrop": dropout, "resid_pdrop": dropout, "attn_pdrop": attention_dropout}
    changes = {name: rate for name, rate in rates.items() if rate is not None}
    model: GPT2LMHeadModel = GPT2LMHeadModel.from_pretrained(
        base, attn_implementation=attention_implementation(base), **changes
    )
    return model


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


def log_split(run: tracking.RunLog, name: str, arrays: TokenArrays, tokens: Path) -> None:
    data_md5 = tracking.dvc_md5("data")
    source = {"split": name, "documents": str(len(arrays)), "tokens": str(len(arrays.tokens))}
    run.log_dataset(name, arrays.sha256[:36], source | ({"dvc.data_md5": data_md5} if data_md5 else {}))


def write_checkpoint(model: GPT2LMHeadModel, base: Path, out: Path) -> None:
    """The weights as safetensors with the base's tokenizer files."""
    save_model(model, out)
    for file in base.iterdir():
        if file.name in TOKENIZER_FILES:
            shutil.copy(file, out)


def summarize(curves: Curves, train: PackedRows, tokens: TokenArrays) -> dict[str, float]:
    """What `dvc metrics` compares: losses in nats a token; nothing that differs between two runs of the same commit."""
    best_step, best_loss = curves.best_validation
    return {
        "train_loss": curves.train[-1][1],
        "validation_loss": best_loss,
        "validation_perplexity": math.exp(best_loss),
        "base_validation_loss": curves.validation[0][1],
        "best_step": best_step,
        "steps": curves.validation[-1][0],
        "train_tokens": len(tokens.tokens),
        "padding_share": train.padding_share,
    }


def write_curve(path: Path, points: list[tuple[int, float]]) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows(points)


if __name__ == "__main__":
    main()
