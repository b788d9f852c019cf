"""Compare `generate --prompts` with the engine's own batch: the same rows, parameters and slots, in one process.

Each round takes all of them, in an order that rotates: the core of the command (read the file, continue its rows,
write and flush each), `TextGenerator.complete`, and `Engine.generate`, which knows only token ids. The result is the
median of the ratios of their rates within the rounds. Neither loading nor the digest of the prompts is timed. All take
the same steps, so what they differ by is the processor time outside of them, which other work on the machine disturbs
less than the rates: it is reported per token.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import one_engine
from contenders import PEER_LIBRARIES, SAMPLED
from serve import requests_of

from pipeline import machine
from pipeline.decoding import ModelDecoding, SamplingParams
from pipeline.engine.generator import SLOTS
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError
from pipeline.files import write_jsonl
from pipeline.many_prompts import Row, Tally, append_rows, read_rows
from pipeline.progress import progress
from pipeline.tokens import prompt_ids

SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_engine.add_options(parser)
    parser.add_argument("--rows", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--slots", type=int, default=SLOTS, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=12, help="default: %(default)s")
    one_engine.run(parser.parse_args(), benchmark)


def benchmark(arguments: argparse.Namespace, engine: Path, threads: int) -> str:
    folder = engine.parent
    generator = TextGenerator.load(engine, provider="cpu", threads=threads, slots=arguments.slots)
    asked = requests_of(arguments.rows)
    prompts = folder / "prompts.jsonl"
    write_jsonl(prompts, [{"prompt": one.prompt, "max_new_tokens": one.max_tokens} for one in asked])
    decoding = ModelDecoding(SamplingParams(**asdict(SAMPLED), ignore_eos=True))
    with prompts.open("rb") as lines:
        rows = [row for row in read_rows(lines, 0, decoding, SEED) if isinstance(row, Row)]
    each = [row.params for row in rows]
    ways: dict[str, Callable[[], int]] = {
        "command": lambda: run_command(generator, prompts, folder / "texts.jsonl", decoding),
        "complete": lambda: sum(len(done.token_ids) for done in generator.complete([row.prompt for row in rows], each)),
        "generate": lambda: generate(generator, [row.prompt for row in rows], each),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    outside_us: dict[str, list[float]] = {name: [] for name in ways}
    counts: dict[str, int] = {}
    steps = count_steps(generator.engine.scheduler)
    names = list(ways)
    for way in ways.values():
        way()
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            steps.clear()
            began_s, began_cpu_s = time.perf_counter(), time.thread_time()
            tokens = ways[name]()
            rates[name].append(tokens / (time.perf_counter() - began_s))
            outside_us[name].append(1e6 * (time.thread_time() - began_cpu_s - sum(steps)) / tokens)
            counts[name] = len(steps)
    if len(set(counts.values())) != 1:
        raise UserError(f"the ways took different numbers of steps: {counts}")
    check_texts(generator, rows, folder / "texts.jsonl")
    return report(arguments, threads, rates, outside_us, sum(own.max_new_tokens or 0 for own in each))


def count_steps(scheduler: Scheduler) -> list[float]:
    """Return a list that gains the processor time of this thread in each step, in seconds."""
    taken: list[float] = []
    step = scheduler.step

    def counted(prefill_tokens: float | None = None) -> None:
        began_s = time.thread_time()
        step(prefill_tokens)
        taken.append(time.thread_time() - began_s)

    scheduler.step = counted  # type: ignore[method-assign]
    return taken


def run_command(generator: TextGenerator, prompts: Path, out: Path, decoding: ModelDecoding) -> int:
    """Do what the command does once the engine is loaded; return the number of tokens drawn."""
    tally = Tally()
    with prompts.open("rb") as lines, out.open("wb") as file, progress(description=None) as bar:
        append_rows(generator, read_rows(lines, 0, decoding, SEED), file, tally, bar)
    return tally.tokens


def generate(generator: TextGenerator, prompts: list[str], each: list[SamplingParams]) -> int:
    ids = [prompt_ids(generator.tokenizer, prompt) for prompt in prompts]
    return sum(len(done.token_ids) for done in generator.engine.generate(ids, each))


def check_texts(generator: TextGenerator, rows: list[Row], out: Path) -> None:
    """Raise `UserError` if what the command wrote is not what `complete` returns."""
    expected = [done.text for done in generator.complete([row.prompt for row in rows], [row.params for row in rows])]
    written = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    if written != expected:
        raise UserError("the command wrote other texts than the engine's batch")


def report(
    arguments: argparse.Namespace,
    threads: int,
    rates: dict[str, list[float]],
    outside_us: dict[str, list[float]],
    tokens: int,
) -> str:
    lines = [
        *(f"{name}: {value}" for name, value in machine.describe(PEER_LIBRARIES).items()),
        f"checkpoint: {Path(arguments.checkpoint).name}, {arguments.precision}; {threads} threads",
        f"{arguments.rows} rows with {tokens:,} tokens per round, {arguments.slots} slots",
        "",
        *(
            f"{name}: median of {np.median(own):.0f} tokens/s; outside of the engine's steps, "
            f"{np.median(outside_us[name]):.0f} µs of a core per token"
            for name, own in rates.items()
        ),
    ]
    for name in ("complete", "generate"):
        ratios = np.array(rates["command"]) / np.array(rates[name])
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        error = ratios.std(ddof=1) / np.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
        lines.append(
            f"command / {name}: {middle:.3f} × ({low:.3f} to {high:.3f} between the quartiles of {len(ratios)} rounds; "
            f"mean {ratios.mean():.3f}, its standard error {error:.3f})"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
