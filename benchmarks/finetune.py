"""Compare fine-tuning with transformers' own recipe, run_clm.py: the same model, data, context, batch and machine.

The recipe: the Trainer's defaults on the training text, concatenated and cut into blocks, a batch per step; in float32,
or on a GPU in bfloat16 (--bf16) if it has that. Ours: `params.yaml`, with the recipe's context, tokens per step and
learning rate. Both run in turn, each in its own process, from the same weights; each round has the text in another
order. At the end both are scored in the same way, on single validation documents. Needs `dvc repro tokenize`.

The share of the peak is that of the fastest product of two large matrices on the same device: a training multiplies and
adds 6 times per token and weight, position embeddings aside, and the products within attention are not counted.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    logging,
    set_seed,
)

from pipeline import machine
from pipeline.errors import UserError, report_errors
from pipeline.files import read_json
from pipeline.params.finetune import FinetuneParams
from pipeline.params.section import PARAMS_FILE
from pipeline.params.whole import load_params
from pipeline.tokens import TokenArrays, load_tokens
from pipeline.training.memory import parts_of_step, peak_bytes
from pipeline.training.model import load_trainable, merge_adapters
from pipeline.training.packing import PackedSteps
from pipeline.training.precision import supports_bfloat16
from pipeline.training.processes import join_processes
from pipeline.training.randomness import fix_randomness
from pipeline.training.trainer import finetune_model

ROOT = Path(__file__).parents[1]

LEARNING_RATE = 5e-5
"""The Trainer's default."""
PRODUCT_SIDE = {"cuda": 8192, "cpu": 2048}
"""The rows and columns of the matrices whose product shows the peak, by device."""
PRODUCTS = 10
WARM_UP_STEPS = 1
"""The steps that are not timed, because they include work that is done once."""
SHAPES = {
    "medium": GPT2Config(n_layer=24, n_embd=1024, n_head=16),
    "tiny": GPT2Config(n_layer=2, n_embd=64, n_head=2),
}
CONTENDERS = ("run_clm", "ours")


@dataclass(frozen=True)
class Measured:
    """One training."""

    tokens_per_second: float
    peak_memory_mib: float
    trained_tokens: int
    validation_loss: float
    """The mean loss, in nats per token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="medium", help="random weights (default: %(default)s)")
    parser.add_argument("--tokens", type=Path, default=Path("out/tokenize"), help="default: %(default)s")
    parser.add_argument("--context", type=int, default=512, help="tokens per block (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=2, help="blocks per optimizer step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of both contenders (default: %(default)s)")
    parser.add_argument(
        "--documents", type=int, default=32, help="validation documents to score (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    internal = parser.add_argument_group("options that the benchmark sets for the process of one contender")
    internal.add_argument("--contender", choices=CONTENDERS, help="train this one, and print its result as JSON")
    internal.add_argument("--base", type=Path, metavar="FOLDER", help="the weights to start from")
    internal.add_argument("--seed", type=int, help="the seed of the order of the text")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with report_errors():
        if arguments.contender is None:
            compare(arguments)
        else:
            measured = train_run_clm(arguments) if arguments.contender == "run_clm" else train_ours(arguments)
            print(json.dumps(asdict(measured)))


def compare(arguments: argparse.Namespace) -> None:
    """Run both in turn, and write the report."""
    if arguments.steps <= WARM_UP_STEPS:
        raise UserError(f"--steps: {arguments.steps} is too few; it must be at least {WARM_UP_STEPS + 1}")
    found: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    peak = product_rate()
    with tempfile.TemporaryDirectory() as folder:
        set_seed(1)
        model = GPT2LMHeadModel(SHAPES[arguments.shape])
        model.save_pretrained(folder)
        parameters = model.num_parameters()
        share_per_rate = 6 * (parameters - model.transformer.wpe.weight.numel()) / peak
        del model
        for seed in range(1, arguments.rounds + 1):
            for name in CONTENDERS:
                values = run_alone("--contender", name, "--base", folder, "--seed", str(seed))
                found[name].append(Measured(**values))
                print(f"{name}: {found[name][-1]}", file=sys.stderr)
    lines = [
        *(f"{name}: {value}" for name, value in machine.describe().items()),
        *([f"gpu: {torch.cuda.get_device_name()}"] if torch.cuda.is_available() else []),
        f"model: {parameters:,} random weights ({arguments.shape}); context {arguments.context}, "
        f"{arguments.blocks * arguments.context} tokens per step, {arguments.steps} steps, "
        f"median of {arguments.rounds} rounds",
        f"peak: {peak / 1e12:.2f} TFLOP/s, the fastest product in {number_type()}",
        "",
        f"{'':10} {'tokens/s':>9} {'of peak':>8} {'peak MiB':>9} {'tokens':>8} {'validation loss':>16}",
    ]
    middle = {name: summarize(own) for name, own in found.items()}
    for name, own in middle.items():
        lines.append(
            f"{name:10} {own.tokens_per_second:9.1f} {own.tokens_per_second * share_per_rate:8.1%} "
            f"{own.peak_memory_mib:9.0f} {own.trained_tokens:8} {own.validation_loss:16.4f}"
        )
    # Compared within a round, because the speed of the machine changes over time.
    rounds = list(zip(found["ours"], found["run_clm"], strict=True))
    speeds = [own.tokens_per_second / other.tokens_per_second for own, other in rounds]
    memories = [own.peak_memory_mib / other.peak_memory_mib for own, other in rounds]
    losses = [own.validation_loss - other.validation_loss for own, other in rounds]
    lines.append(
        f"ours / run_clm: {median(speeds):.2f} × tokens per second, {median(memories):.2f} × memory, "
        f"{mean(losses):+.4f} nats" + (f" ± {stdev(losses) / math.sqrt(len(losses)):.4f}" if len(losses) > 1 else "")
    )
    lines += [
        f"round {number}, with its own order of the text: {speed:.2f} ×, {loss:+.4f} nats"
        for number, (speed, loss) in enumerate(zip(speeds, losses, strict=True), start=1)
    ]
    report = "\n".join(lines)
    print(report)
    if arguments.out is not None:
        arguments.out.write_text(report + "\n", encoding="utf-8")


def run_alone(*options: str) -> Any:
    """Run this program in a new process with these options besides its own, and return the JSON of its last line."""
    command = [sys.executable, *sys.argv, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarize(measured: list[Measured]) -> Measured:
    columns = {name: median(getattr(own, name) for own in measured) for name in asdict(measured[0])}
    return Measured(**columns | {"trained_tokens": measured[0].trained_tokens})


def number_type() -> torch.dtype:
    """Return the type in which our training multiplies here."""
    return torch.bfloat16 if supports_bfloat16() else torch.float32


def product_rate() -> float:
    """Return the operations per second of the fastest of several products of two large random matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = PRODUCT_SIDE[device]
    left, right = torch.randn((2, side, side), device=device, dtype=number_type())
    seconds = []
    for _ in range(PRODUCTS):
        finish_work()
        started = time.perf_counter()
        left @ right
        finish_work()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def finish_work() -> None:
    """Wait until the GPU, if there is one, has done what it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def load_split(tokens: Path, split: str) -> TokenArrays:
    meta = tokens / split / "meta.json"
    if not meta.is_file():
        raise UserError(f"{meta}: no such file; make it with dvc repro tokenize")
    return load_tokens(tokens / split, read_json(meta)["tokenizer_sha256"])


class StepTimer(TrainerCallback):
    """Measures the seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        finish_work()
        self.seconds.append(time.perf_counter() - self._began)


def train_run_clm(arguments: argparse.Namespace) -> Measured:
    """Train like examples/pytorch/language-modeling/run_clm.py with --block_size and --per_device_train_batch_size."""
    train = load_split(arguments.tokens, "train")
    text = np.concatenate([train.document(index)[1:-1] for index in range(len(train))]).astype(np.int64)
    count = len(text) // arguments.context
    blocks = torch.from_numpy(text[: count * arguments.context].reshape(count, arguments.context))
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in blocks]
    model = GPT2LMHeadModel.from_pretrained(arguments.base)
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                seed=arguments.seed,
                per_device_train_batch_size=arguments.blocks,
                max_steps=arguments.steps,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available() and supports_bfloat16(),
            ),
            train_dataset=rows,
            data_collator=default_data_collator,
            callbacks=[timer],
        ).train()
    # The first token of a block is not a label.
    labels = arguments.blocks * (arguments.context - 1)
    speed = labels * (arguments.steps - WARM_UP_STEPS) / sum(timer.seconds[WARM_UP_STEPS:])
    peak = peak_bytes(model.device) / 2**20
    tokens = arguments.blocks * arguments.context * arguments.steps
    return Measured(speed, peak, tokens, score(model, arguments))


class Speeds:
    """A log that keeps the speed of each step."""

    def __init__(self) -> None:
        self.tokens_per_second: list[float] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        if "tokens_per_second" in values:
            self.tokens_per_second.append(values["tokens_per_second"])

    def log_checkpoint(self, step: int, scores: dict[str, float]) -> None:
        """Keep nothing: scores are not speeds."""


def ours_params(arguments: argparse.Namespace, train: TokenArrays) -> FinetuneParams:
    batch_tokens = arguments.blocks * arguments.context
    changes = {
        "seed": arguments.seed,
        "context_length": arguments.context,
        "batch_tokens": batch_tokens,
        "learning_rate": LEARNING_RATE,
        "warmup_share": 0.0,
        "evaluations": 1,
    }
    params = load_params(ROOT / PARAMS_FILE).finetune.model_copy(update=changes)
    steps_per_epoch = PackedSteps(train, context_length=arguments.context, batch_tokens=batch_tokens).steps_per_epoch
    return params.model_copy(update={"epochs": arguments.steps / steps_per_epoch})


def train_ours(arguments: argparse.Namespace) -> Measured:
    """Train like the stage, with one validation document to score meanwhile; writes a checkpoint at the end."""
    train, validation = (load_split(arguments.tokens, split) for split in ("train", "validation"))
    params, processes = ours_params(arguments, train), join_processes()
    fix_randomness(params.seed)
    model, log = load_trainable(arguments.base, params), Speeds()
    model.to(processes.device)
    parts = parts_of_step(model, params, context_length=arguments.context, processes=processes.count)
    sizes = {"context_length": arguments.context, "batch_tokens": params.batch_tokens, "parts": parts}
    steps = PackedSteps(train, epochs=params.epochs, seed=params.seed, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        finetune_model(
            model,
            steps,
            PackedSteps(validation, share=1 / len(validation), **sizes),
            params,
            processes=processes,
            work_folder=Path(folder),
            log=log,
            on_evaluation=lambda model, step: None,
        )
    tokens = sum(window.tokens for step in range(steps.steps) for window in steps.step_windows(step))
    speeds = log.tokens_per_second[WARM_UP_STEPS:]
    peak = peak_bytes(model.device) / 2**20
    return Measured(
        len(speeds) / sum(1 / speed for speed in speeds), peak, tokens, score(merge_adapters(model), arguments)
    )


def score(model: GPT2LMHeadModel, arguments: argparse.Namespace) -> float:
    """Return the mean loss of some validation documents, each read alone, in float32, in nats per token."""
    validation = load_split(arguments.tokens, "validation")
    weights = model.state_dict()
    model = GPT2LMHeadModel(GPT2Config.from_pretrained(arguments.base)).eval()
    model.load_state_dict(weights)
    total, count = 0.0, 0
    with torch.inference_mode():
        for index in range(min(arguments.documents, len(validation))):
            ids = torch.from_numpy(validation.document(index)[: arguments.context].astype(np.int64))
            logits = model(ids[None, :-1]).logits[0]
            total += cross_entropy(logits[:-1], ids[1:-1], reduction="sum").item()
            count += len(ids) - 2
    return total / count if count else math.nan


if __name__ == "__main__":
    main()
