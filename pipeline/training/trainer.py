"""Fine-tuning with transformers' Trainer: exact validation loss, and a hook at each evaluation."""

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    GPT2LMHeadModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pipeline.checkpoint import weights_written
from pipeline.errors import UserError
from pipeline.params import FinetuneParams
from pipeline.training.optimizer import build_optimizer
from pipeline.training.packing import IGNORED_LABEL, PackedRows, RowCollator
from pipeline.training.resume import WHOLE_FILE

TF32_CAPABILITY = (8, 0)
"""Of the first GPUs that have it, Ampere's."""
LOGGED_POINTS = 100
"""Points of the training curves, evenly spread."""


class MetricsLog(Protocol):
    """Where metrics go; `pipeline.tracking.RunLog` is one."""

    def log_metrics(self, values: dict[str, float], step: int) -> None: ...


@dataclass
class Curves:
    """Losses in nats a token at the steps where they were taken."""

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best_validation(self) -> tuple[int, float]:
        """Step and loss of the best checkpoint; the untrained base at step 0 is not one."""
        return min(self.validation[1:], key=lambda point: point[1])


def finetune_model(
    model: GPT2LMHeadModel,
    train: PackedRows,
    validation: PackedRows,
    params: FinetuneParams,
    *,
    end_of_text_id: int,
    work_folder: Path,
    log: MetricsLog,
    on_evaluation: Callable[[GPT2LMHeadModel, int], None],
    resume_from: Path | None = None,
    stop: threading.Event | None = None,
) -> Curves:
    """Train `model` in place and leave the weights of its best validation loss in it.

    `work_folder` holds checkpoints while training runs, with all that is needed to go on from one: `resume_from`. What
    comes of it then is what an uninterrupted training would have given, bit for bit on the same machine.
    `on_evaluation` is called with model and step after each scoring of the validation split, the first at step 0.
    Raises `UserError` where the loss is no longer finite, and `Stopped` where `stop` is set: after the step at hand,
    with a checkpoint of it.
    """
    trainer = PackedTrainer(
        model=model,
        args=training_arguments(
            params, train_rows=len(train), work_folder=work_folder, is_resumed=resume_from is not None
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=RowCollator(end_of_text_id),
        # The Trainer makes the schedule.
        optimizers=(build_optimizer(model, params), None),
        callbacks=[
            EarlyStoppingCallback(params.early_stopping_patience),
            EvaluationSchedule(params.evaluations),
            CurveCallback(log, on_evaluation),
            *([] if stop is None else [StopCallback(stop)]),
        ],
    )
    for talkative in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(talkative)
    if sys.stderr.isatty():
        trainer.add_callback(BarCallback)
    # With a cache transformers 4.57 does not look at the positions, and packed documents attend to each other.
    model.config.use_cache = False
    with weights_written(work_folder):
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    model.config.use_cache = True
    if stop is not None and stop.is_set() and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(trainer.state.global_step)
    return Curves(*(_points(trainer.state, name) for name in ("loss", "eval_loss")))


def _points(state: TrainerState, name: str) -> list[tuple[int, float]]:
    """The curve of a value that the Trainer logged, before an interruption too."""
    return [(entry["step"], entry[name]) for entry in state.log_history if name in entry]


def training_arguments(
    params: FinetuneParams, *, train_rows: int, work_folder: Path, is_resumed: bool = False
) -> TrainingArguments:
    """The Trainer's arguments. Raises `UserError` where the training split gives fewer steps than evaluations."""
    rows_per_step = params.batch_rows * params.gradient_accumulation_steps
    steps = math.ceil(math.ceil(train_rows / rows_per_step) * params.epochs)
    if steps < params.evaluations:
        raise UserError(
            f"finetune.evaluations: {params.evaluations} evaluations do not fit in {steps} optimizer steps; "
            "lower it, or raise finetune.epochs"
        )
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work_folder),
        seed=params.seed,
        num_train_epochs=params.epochs,
        per_device_train_batch_size=params.batch_rows,
        per_device_eval_batch_size=params.batch_rows,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        lr_scheduler_type="cosine",
        warmup_ratio=params.warmup_share,
        max_grad_norm=params.max_grad_norm,
        bf16=supports_bfloat16(),
        # What stays in float32 is rounded to TF32 in products of matrices, where a GPU has it.
        tf32=True if on_gpu and torch.cuda.get_device_capability() >= TF32_CAPABILITY else None,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        eval_strategy="steps",
        # Never reached before the end: `EvaluationSchedule` says when.
        eval_steps=steps,
        eval_on_start=not is_resumed,
        save_strategy="steps",
        save_steps=steps,
        # The best and the newest. With a limit of one the Trainer would remove the newest in the end.
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=max(1, steps // LOGGED_POINTS),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
    )


def supports_bfloat16() -> bool:
    """Whether the GPU, or without one the processor, multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class PackedTrainer(Trainer):
    """Trainer over packed rows that scores the validation split a token, not a batch, and counts tokens a second."""

    control: TrainerControl

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._counting_since = time.perf_counter()

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None) -> Any:
        self._tokens += (inputs["labels"] != IGNORED_LABEL).sum().to(self._tokens.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        now = time.perf_counter()
        if "loss" in logs:
            logs["tokens_per_second"] = self._tokens.item() / (now - self._counting_since)
            self._tokens.zero_()
            self._counting_since = now
        super().log(logs, start_time)

    def _rotate_checkpoints(self, use_mtime: bool = False, output_dir: str | None = None) -> None:
        """Called when every file of a checkpoint is written: only now the one before it may go."""
        newest = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (newest / WHOLE_FILE).touch()
        super()._rotate_checkpoints(use_mtime=False, output_dir=output_dir)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Mean negative log-likelihood a label, in nats, over the whole split.

        The Trainer's own is a mean of batch means, which weighs a token by the batch it happens to be in.
        """
        started = time.perf_counter()
        loader = self.get_eval_dataloader(eval_dataset)
        model = self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.inference_mode():
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                labels = (inputs["labels"] != IGNORED_LABEL).sum()
                with self.compute_loss_context_manager():
                    loss = model(**inputs).loss
                total += torch.stack([loss.double() * labels, labels.double()])
        loss_sum, label_count = self.accelerator.reduce(total, reduction="sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / label_count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._counting_since += time.perf_counter() - started
        return metrics


class EvaluationSchedule(TrainerCallback):
    """Scores and saves the model `evaluations` times, evenly spread, the last time after the last step.

    The Trainer's own every so many steps gives another number of times where the steps do not divide evenly.
    """

    def __init__(self, evaluations: int) -> None:
        self.evaluations = evaluations

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        due, due_before = (
            step * self.evaluations // state.max_steps for step in (state.global_step, state.global_step - 1)
        )
        # Logged too, so that the mean loss of a point never reaches back before a checkpoint.
        if due > due_before:
            control.should_log = control.should_evaluate = control.should_save = True
        return control


class Stopped(Exception):  # noqa: N818
    """Training was told to stop; the first argument is after which step it did."""


class StopCallback(TrainerCallback):
    """Saves and stops after the step at hand when it is told to."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.stop.is_set():
            control.should_save = control.should_training_stop = True
        return control


class CurveCallback(TrainerCallback):
    """Sends the curves to the run, and tells each evaluation in a line."""

    def __init__(self, log: MetricsLog, on_evaluation: Callable[[GPT2LMHeadModel, int], None]) -> None:
        self.run_log = log
        self.on_evaluation = on_evaluation

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        step = state.global_step
        if "loss" in logs:
            _check_finite("training", logs["loss"], step)
            metrics = {
                "train_loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "gradient_norm": logs["grad_norm"],
                "tokens_per_second": logs["tokens_per_second"],
            }
            self.run_log.log_metrics(metrics, step)
        if "eval_loss" in logs:
            _check_finite("validation", logs["eval_loss"], step)
            # Infinite, where the language's own would overflow.
            perplexity = torch.tensor(logs["eval_loss"], dtype=torch.float64).exp().item()
            self.run_log.log_metrics({"validation_loss": logs["eval_loss"], "validation_perplexity": perplexity}, step)
            training = _points(state, "loss")
            train_loss = f"train loss {training[-1][1]:.3f}, " if training else ""
            tqdm.write(
                f"step {step} of {state.max_steps}: {train_loss}validation loss {logs['eval_loss']:.3f}, "
                f"perplexity {perplexity:.2f}",
                file=sys.stderr,
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: GPT2LMHeadModel,
        **_: Any,
    ) -> None:
        self.on_evaluation(model, state.global_step)


class BarCallback(ProgressCallback):
    """A progress bar without the Trainer's own lines of numbers."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


def _check_finite(name: str, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"finetune: the {name} loss is {loss} at step {step}; lower finetune.learning_rate")
