"""Fine-tune with transformers' Trainer: exact validation loss, resumable checkpoints, a hook at each evaluation."""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn, Protocol

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import Sampler, SequentialSampler
from tqdm import tqdm
from transformers import (
    GPT2LMHeadModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from pipeline.checkpoint import explain_unwritten_weights
from pipeline.curves import Curves, Point
from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.params.finetune import FinetuneParams
from pipeline.training.memory import keep_freed_memory, peak_bytes
from pipeline.training.optimizer import build_optimizer, learning_rate_schedule
from pipeline.training.packing import IGNORED_LABEL, PackedSteps, only_batch
from pipeline.training.precision import supports_bfloat16, supports_tf32
from pipeline.training.processes import Processes
from pipeline.training.state import STEP_LOSSES_FILE, WHOLE_FILE, TrainingState
from pipeline.training.stopping import EarlyStopping, StopCallback, Stopped, is_finished

FSDP = {
    "transformer_layer_cls_to_wrap": ["GPT2Block"],
    # Every process has already read the same weights.
    "sync_module_states": False,
}
EXPLODED = 2.0
"""The multiple of the loss of a uniform guess, or of the base if that is larger, from which a loss does not recover."""
RUN_METRICS = {
    "loss": "train_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "tokens_per_second": "tokens_per_second",
    "eval_loss": "validation_loss",
}
"""The Trainer's names of values, and the run's."""
CHECKPOINT_SCORES = ("validation_loss", "validation_perplexity")
"""The metrics that are also those of the weights at that step."""
LOGGED_POINTS = 100
"""The number of points of the training curves, evenly spread."""


class MetricsLog(Protocol):
    """A destination for metrics, such as `pipeline.tracking.runs.RunLog`."""

    def log_metrics(self, values: dict[str, float], step: int) -> None: ...

    def log_checkpoint(self, step: int, scores: dict[str, float]) -> None: ...


def finetune_model(
    model: GPT2LMHeadModel | PeftModel,
    train: PackedSteps,
    validation: PackedSteps,
    params: FinetuneParams,
    *,
    processes: Processes,
    work_folder: Path,
    log: MetricsLog | None,
    on_evaluation: Callable[[GPT2LMHeadModel, int], None],
    resume_from: Path | None = None,
    stop: threading.Event | None = None,
) -> Curves:
    """Train `model` in place and leave the weights of its best validation loss in it.

    `work_folder` holds the checkpoints while training runs. With one of them as `resume_from`, training resumes there,
    and gives what an uninterrupted training would have given, bit for bit on the same machine. Calls `on_evaluation`
    with model and step after each scoring of the validation split, the first at step 0. Raises `UserError` if the loss
    is not finite or explodes, or if the GPU's memory is full. If `stop` is set before the end, finishes the current
    step, saves a checkpoint and raises `Stopped`.
    """
    if processes.device.type == "cpu":
        keep_freed_memory()
    trainer = PackedTrainer(
        model=model,
        params=params,
        args=training_arguments(
            params, train, work_folder=work_folder, processes=processes, is_resumed=resume_from is not None
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=only_batch,
        callbacks=[
            EarlyStopping(params.early_stopping_patience),
            EvaluationSchedule(params.evaluations),
            BestCheckpoint(),
            CurveCallback(log, on_evaluation),
            *([] if stop is None else [StopCallback(stop, processes)]),
        ],
    )
    for talkative in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(talkative)
    if sys.stderr.isatty() and processes.is_first:
        trainer.add_callback(BarCallback)
    if resume_from is not None:
        state = TrainerState.load_from_json(str(resume_from / TRAINER_STATE_NAME))
        if is_finished(state, params.early_stopping_patience):
            # Only the best weights are left to load.
            trainer.args.max_steps = state.global_step
        trainer.step_losses += read_json(resume_from / STEP_LOSSES_FILE)
    with explain_unwritten_weights(work_folder), _explain_full_memory():
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    if not is_finished(trainer.state, params.early_stopping_patience):
        raise Stopped(trainer.state.global_step)
    return Curves(*(_points(trainer.state, name) for name in ("loss", "eval_loss")))


@contextmanager
def _explain_full_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "finetune.device_batch_tokens: the GPU's memory is full; set it lower, or set "
            f"finetune.gradient_checkpointing ({str(error).splitlines()[0]})"
        ) from error


def _points(state: TrainerState, name: str) -> list[Point]:
    """Return the curve of a value that the Trainer logged, including before an interruption."""
    return [(entry["step"], entry[name]) for entry in state.log_history if name in entry]


def training_arguments(
    params: FinetuneParams,
    train: PackedSteps,
    *,
    work_folder: Path,
    processes: Processes,
    is_resumed: bool = False,
) -> TrainingArguments:
    """Return the Trainer's arguments. Raises `UserError` if the training split gives fewer steps than evaluations."""
    if train.steps < params.evaluations:
        raise UserError(
            f"finetune.evaluations: {params.evaluations} evaluations do not fit in {train.steps} optimizer steps; "
            "lower it, or raise finetune.epochs"
        )
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(work_folder),
        seed=params.seed,
        max_steps=train.steps,
        # An item of the data set is already a batch, and one pass over it covers all epochs.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=train.parts // processes.count,
        gradient_checkpointing=params.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **learning_rate_schedule(params),
        max_grad_norm=params.max_grad_norm,
        bf16=supports_bfloat16(),
        # Matrix products that stay in float32 are rounded to TF32 if the GPU supports it.
        tf32=True if supports_tf32() else None,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        fsdp="full_shard auto_wrap" if params.fsdp else "",
        fsdp_config=FSDP if params.fsdp else None,
        eval_strategy="steps",
        # Reached only at the end: `EvaluationSchedule` decides when to evaluate.
        eval_steps=train.steps,
        eval_on_start=not is_resumed,
        save_strategy="steps",
        save_steps=train.steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=max(1, train.steps // LOGGED_POINTS),
        logging_nan_inf_filter=False,
        log_level_replica="error",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
    )
    # One GPU per process: otherwise the Trainer spreads a process over all visible GPUs, which is slower than one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class PackedTrainer(Trainer):
    """A Trainer over flat batches that scores the validation split per token, not per batch, and logs its speed."""

    control: TrainerControl
    eval_dataset: PackedSteps

    def __init__(self, *, params: FinetuneParams, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._params = params
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._counting_since = time.perf_counter()
        self._batch_losses: list[torch.Tensor] = []
        """The losses of the batches in this process that are not yet part of `step_losses`."""
        self.step_losses: list[float] = []
        """The losses of the steps since the last point of the training curve."""

    def create_optimizer(self) -> Optimizer:
        """Make our optimizer; only when the Trainer asks, because FSDP replaces the weights when it shards them."""
        if self.optimizer is None:
            self.optimizer: Optimizer = build_optimizer(self.model, self._params)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Keep the order: `PackedSteps` has already shuffled."""
        train: PackedSteps = self.train_dataset
        return SequentialSampler(range(self.args.max_steps * train.parts))

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None) -> Any:
        self._tokens += (inputs["labels"] != IGNORED_LABEL).sum().to(self._tokens.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._batch_losses.append(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        now = time.perf_counter()
        if "loss" in logs:
            logs["tokens_per_second"] = self._sum_over_processes(self._tokens).item() / (now - self._counting_since)
            self._gather_losses()
            # The Trainer's own mean counts from the last checkpoint that training resumed from.
            logs["loss"] = round(fmean(self.step_losses), 4)
            self.step_losses.clear()
            self._tokens.zero_()
            self._counting_since = now
        super().log(logs, start_time)

    def _gather_losses(self) -> None:
        """Note the loss of each step since the last call. Raises `UserError` if one is not finite, or far too high.

        A batch's loss is its share of the loss of the step, times the number of processes.
        """
        if not self._batch_losses:
            return
        batches = torch.stack(self._batch_losses).view(-1, self.args.gradient_accumulation_steps)
        losses: list[float] = self.accelerator.reduce(batches.sum(dim=1), reduction="mean").tolist()
        self._batch_losses.clear()
        limit = EXPLODED * max(math.log(self.model.config.vocab_size), self._loss_at_start)
        for step, loss in enumerate(losses, start=self.state.global_step - len(losses) + 1):
            if not loss <= limit:
                self._refuse(f"the training loss is {loss:.4g} at", step)
        self.step_losses += losses

    def _refuse(self, found: str, step: int) -> NoReturn:
        train: PackedSteps = self.train_dataset
        documents = sorted({window.document for window in train.step_windows(step - 1)})
        raise UserError(
            f"finetune: {found} step {step}, which learns from training documents "
            f"{', '.join(str(document + 1) for document in documents)}; "
            f"lower finetune.learning_rate, or look at these documents{self._last_good_checkpoint()}"
        )

    def _last_good_checkpoint(self) -> str:
        folder = TrainingState(Path(self.args.output_dir)).checkpoint
        return "" if folder is None else f"; the last good checkpoint is kept in {folder}"

    @property
    def _loss_at_start(self) -> float:
        return next((entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry), 0.0)

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of each value over the processes."""
        summed: torch.Tensor = self.accelerator.reduce(values, reduction="sum")
        return summed

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, in place of older ones that are not needed, unless training has gone wrong."""
        self._gather_losses()
        weights = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in self.model.parameters())
        broken = torch.stack([~weight.isfinite().all() for weight in weights]).sum()
        if self._sum_over_processes(broken).item():
            self._refuse("the weights are not finite after", self.state.global_step)
        if self.args.should_save:
            TrainingState(Path(self.args.output_dir)).make_room(self.state.best_model_checkpoint)
        super()._save_checkpoint(model, trial)

    def _rotate_checkpoints(self, use_mtime: bool = False, output_dir: str | None = None) -> None:
        """Mark the newest checkpoint as whole; called when all its files are written."""
        newest = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        write_json(newest / STEP_LOSSES_FILE, self.step_losses)
        (newest / WHOLE_FILE).touch()

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Return the mean negative log-likelihood per label, in nats, over the whole split.

        The Trainer's own is a mean of batch means, which weighs a token by the batch it happens to be in.
        """
        started = time.perf_counter()
        model = self.model_wrapped.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        with torch.no_grad():
            for index in range(rank, len(self.eval_dataset), processes):
                inputs = self._prepare_inputs(self.eval_dataset[index])
                with self.compute_loss_context_manager():
                    summed = model(**inputs, num_items_in_batch=1).loss
                total += torch.stack([summed.double(), (inputs["labels"] != IGNORED_LABEL).sum().double()])
        loss_sum, label_count = self._sum_over_processes(total).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / label_count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._counting_since += time.perf_counter() - started
        return metrics


class EvaluationSchedule(TrainerCallback):
    """A callback that scores and saves the model `evaluations` times, evenly spread, the last after the last step.

    The Trainer's own interval in steps gives a different number of evaluations if it does not divide the steps.
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


class BestCheckpoint(TrainerCallback):
    """A callback that tells every process the best checkpoint.

    The Trainer checks whether the folder exists, and one process may check before another has made it.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")


def run_metrics(logs: dict[str, float]) -> dict[str, float]:
    """Return what the run records of a log entry of the Trainer."""
    metrics = {name: logs[key] for key, name in RUN_METRICS.items() if key in logs}
    if "eval_loss" in logs:
        # torch gives infinity if it overflows; Python's math.exp would raise.
        metrics["validation_perplexity"] = torch.tensor(logs["eval_loss"], dtype=torch.float64).exp().item()
    return metrics


class CurveCallback(TrainerCallback):
    """A callback that logs the curves to the run, and prints a line per evaluation."""

    def __init__(self, log: MetricsLog | None, on_evaluation: Callable[[GPT2LMHeadModel, int], None]) -> None:
        self.run_log = log
        self.on_evaluation = on_evaluation

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record again what came before an interruption: the run may be a new one, in another store."""
        for entry in state.log_history:
            self._record(run_metrics(entry), entry["step"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        step, metrics = state.global_step, run_metrics(logs)
        if "eval_loss" in logs:
            if not math.isfinite(loss := logs["eval_loss"]):
                raise UserError(f"finetune: the validation loss is {loss} at step {step}; lower finetune.learning_rate")
            metrics["peak_memory_mib"] = peak_bytes(args.device) / 2**20
        self._record(metrics, step)
        if "eval_loss" in logs:
            training = _points(state, "loss")
            train_loss = f"train loss {training[-1][1]:.3f}, " if training else ""
            self._print_line(
                f"step {step} of {state.max_steps}: {train_loss}validation loss {logs['eval_loss']:.3f}, "
                f"perplexity {metrics['validation_perplexity']:.2f}"
            )

    def _record(self, metrics: dict[str, float], step: int) -> None:
        if self.run_log is None:
            return
        scores = {name: value for name, value in metrics.items() if name in CHECKPOINT_SCORES}
        others = {name: value for name, value in metrics.items() if name not in CHECKPOINT_SCORES}
        if scores:
            self.run_log.log_checkpoint(step, scores)
        if others:
            self.run_log.log_metrics(others, step)

    def _print_line(self, line: str) -> None:
        if self.run_log is not None:
            tqdm.write(line, file=sys.stderr)

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
