"""Fine-tune a base on token arrays: load both, check them, cut steps to fit memory, and train."""

import math
import threading
from dataclasses import dataclass
from pathlib import Path

from transformers import GPT2LMHeadModel

from pipeline.curves import Curves
from pipeline.params.finetune import FinetuneParams
from pipeline.tokens import load_tokenizer, load_tokens, tokenizer_sha256
from pipeline.tracking.runs import RunLog
from pipeline.training.checks import check_fsdp, check_vocabulary, window_length
from pipeline.training.memory import parts_of_step
from pipeline.training.model import gather_weights, load_trainable, merge_adapters
from pipeline.training.packing import PackedSteps
from pipeline.training.precision import supports_bfloat16
from pipeline.training.processes import Processes
from pipeline.training.randomness import fix_randomness
from pipeline.training.recording import log_samples, log_splits
from pipeline.training.samples import generate_samples, score_samples
from pipeline.training.state import TrainingState
from pipeline.training.trainer import finetune_model


@dataclass(frozen=True)
class Trained:
    """The result of a training."""

    model: GPT2LMHeadModel
    curves: Curves
    steps: PackedSteps


def train(
    tokens: Path,
    base: Path,
    params: FinetuneParams,
    run: RunLog | None,
    processes: Processes,
    state: TrainingState,
    stop: threading.Event | None,
) -> Trained:
    """Fine-tune in each of the `processes`. The first records the training in `run`; the others have None."""
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
        log_splits(run, splits)
        precision = "bfloat16" if supports_bfloat16() else "float32"
        run.set_tags({"finetune.precision": precision, "finetune.batches_per_step": str(parts)})

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
        model = gather_weights(model, load_trainable(base, params))
    return Trained(merge_adapters(model), curves, steps)


def summarize(trained: Trained) -> dict[str, float]:
    """Return the figures of a training; losses in nats per token.

    Nothing in them differs between two runs of the same commit.
    """
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
