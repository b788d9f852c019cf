"""Measure what the size of a batch costs on this machine: the same optimizer steps, cut into more and fewer batches.

Prints, for each size, the median seconds per step, the peak memory, and the memory that `training/memory.py` plans
with, next to what the process held before. Each size runs in a process of its own. Needs `dvc repro tokenize`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import psutil
import torch
from finetune import WARM_UP_STEPS, load_split
from transformers import logging

from pipeline import machine
from pipeline.errors import report_errors
from pipeline.params.whole import load_params
from pipeline.training.memory import keep_freed_memory, measure_footprint, peak_bytes
from pipeline.training.model import load_trainable
from pipeline.training.optimizer import build_optimizer
from pipeline.training.packing import PackedSteps

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("out/base"), help="default: %(default)s")
    parser.add_argument("--tokens", type=Path, default=Path("out/tokenize"), help="default: %(default)s")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens per step (default: %(default)s)")
    parser.add_argument("--parts", default="16,8,4,2,1", help="batches per step to compare (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps of each, of which one is not timed")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--one", type=int, help="measure this number of batches, and print JSON; set by the benchmark")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with report_errors():
        if arguments.one is None:
            compare(arguments)
        else:
            print(json.dumps(measure(arguments, arguments.one)))


def compare(arguments: argparse.Namespace) -> None:
    lines = [
        *(f"{name}: {value}" for name, value in machine.describe().items()),
        f"{arguments.batch_tokens} tokens per step, median of {arguments.steps - WARM_UP_STEPS} steps",
        "",
        f"{'batches':>8} {'tokens each':>12} {'s per step':>11} {'peak MiB':>9} {'planned MiB':>12}",
    ]
    for parts in arguments.parts.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", parts]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds, peak, planned = json.loads(done.stdout.splitlines()[-1])
        tokens = arguments.batch_tokens // int(parts)
        lines.append(f"{parts:>8} {tokens:12} {seconds:11.2f} {peak / MIB:9.0f} {planned / MIB:12.0f}")
    report = "\n".join(lines)
    print(report)
    if arguments.out is not None:
        arguments.out.write_text(report + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace, parts: int) -> tuple[float, int, float]:
    """Return the median seconds of a step, the peak memory and the planned memory, both in bytes."""
    params = load_params().finetune
    model = load_trainable(arguments.base, params)
    model.train()
    before = psutil.Process().memory_info().rss
    context_length = params.context_length or model.config.n_positions
    planned = before + measure_footprint(model, params, context_length).bytes_of(arguments.batch_tokens // parts)
    keep_freed_memory()
    sizes = {"context_length": context_length, "batch_tokens": arguments.batch_tokens, "parts": parts}
    steps = PackedSteps(load_split(arguments.tokens, "train"), epochs=1000, seed=params.seed, **sizes)
    optimizer = build_optimizer(model, params)
    seconds = []
    for step in range(arguments.steps):
        began = time.perf_counter()
        for part in range(parts):
            model(**steps[step * parts + part], num_items_in_batch=torch.tensor(arguments.batch_tokens)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return median(seconds[WARM_UP_STEPS:]), peak_bytes(model.device), planned


if __name__ == "__main__":
    main()
