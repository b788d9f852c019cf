"""Measure what the size of a batch costs on this machine: the same optimizer steps, cut into more and fewer batches.

Prints the median seconds per step, the peak memory of the process, and what it was planned to be: what the process held
before, and what `training/memory.py` adds. Each size runs in a process of its own. Needs `dvc repro tokenize`.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import psutil
from finetune import WARM_UP_STEPS, load_split, run_alone
from transformers import logging

from pipeline import machine
from pipeline.advice.learning_rate import take_step
from pipeline.errors import report_errors
from pipeline.params.whole import load_params
from pipeline.training.checks import window_length
from pipeline.training.memory import keep_freed_memory, measure_footprint, peak_bytes
from pipeline.training.model import load_trainable
from pipeline.training.optimizer import build_optimizer
from pipeline.training.packing import PackedSteps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("out/base"), help="default: %(default)s")
    parser.add_argument("--tokens", type=Path, default=Path("out/tokenize"), help="default: %(default)s")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens per step (default: %(default)s)")
    parser.add_argument("--parts", default="16,8,4,2,1", help="batches per step to compare (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps of each, of which the first is not timed")
    parser.add_argument("--one", type=int, help="measure this number of batches, and print JSON; set by the benchmark")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with report_errors():
        if arguments.one is None:
            compare(arguments)
        else:
            print(json.dumps(measure(arguments, arguments.one)))


def compare(arguments: argparse.Namespace) -> None:
    """Print a row for each number of batches as it is measured."""
    for name, value in machine.describe().items():
        print(f"{name}: {value}")
    print(f"{arguments.batch_tokens} tokens per step, median of {arguments.steps - WARM_UP_STEPS} steps\n")
    print(f"{'batches':>8} {'tokens each':>12} {'s per step':>11} {'peak MiB':>9} {'planned MiB':>12}")
    for parts in map(int, arguments.parts.split(",")):
        seconds, peak, planned = run_alone("--one", str(parts))
        sizes = f"{parts:8} {arguments.batch_tokens // parts:12}"
        print(f"{sizes} {seconds:11.2f} {peak / 2**20:9.0f} {planned / 2**20:12.0f}")


def measure(arguments: argparse.Namespace, parts: int) -> tuple[float, int, float]:
    """Return the median seconds of a step, the peak memory and the planned memory, both in bytes."""
    params = load_params().finetune
    model = load_trainable(arguments.base, params)
    model.train()
    before = psutil.Process().memory_info().rss
    context_length = window_length(params, model.config.n_positions)
    planned = before + measure_footprint(model, params, context_length).bytes_of(arguments.batch_tokens // parts)
    keep_freed_memory()
    steps = PackedSteps(
        load_split(arguments.tokens, "train"),
        context_length=context_length,
        batch_tokens=arguments.batch_tokens,
        # Every epoch has at least one step, so this many epochs suffice.
        epochs=arguments.steps,
        seed=params.seed,
        parts=parts,
    )
    optimizer = build_optimizer(model, params)
    seconds = []
    for step in range(arguments.steps):
        began = time.perf_counter()
        take_step(model, steps, step, optimizer, params)
        seconds.append(time.perf_counter() - began)
    return median(seconds[WARM_UP_STEPS:]), peak_bytes(model.device), planned


if __name__ == "__main__":
    main()
