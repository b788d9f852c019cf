"""Measure what it saves that slots keep what they hold: the first token of a prompt that begins as an earlier one did.

In every round two requests come one after the other: the first begins as nothing before it, the second begins as the
first, and the rest differs.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
import one_engine

from pipeline import machine
from pipeline.decoding import SamplingParams
from pipeline.engine import Engine

PARAMS = SamplingParams(max_new_tokens=4, seed=1, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_engine.add_options(parser)
    parser.add_argument("--shared", type=int, default=500, help="tokens of the common beginning (default: %(default)s)")
    parser.add_argument("--own", type=int, default=20, help="tokens of the rest (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    one_engine.run(parser.parse_args(), measure)


def measure(arguments: argparse.Namespace, folder: Path, threads: int) -> str:
    engine = Engine.load(folder, precision=arguments.precision, provider="cpu", threads=threads)
    generator = np.random.default_rng(0)
    ids = generator.integers(
        0, engine.manifest.vocabulary_size, (arguments.rounds + 1, arguments.shared + 2 * arguments.own)
    )
    times = []
    for row in ids.tolist():
        beginning, rest = row[: arguments.shared], row[arguments.shared :]
        prompts = [beginning + rest[: arguments.own], beginning + rest[arguments.own :]]
        times.append([first_token_ms(engine, prompt) for prompt in prompts])
    # The first round warms up.
    first, second = (median(own) for own in zip(*times[1:], strict=True))
    ratios = sorted(pair[0] / pair[1] for pair in times[1:])
    lines = [
        *(f"{name}: {value}" for name, value in machine.describe().items()),
        f"checkpoint: {Path(arguments.checkpoint).name}, {arguments.precision}; {threads} threads",
        f"prompts: {arguments.shared} tokens that both share, and {arguments.own} of their own; median of "
        f"{arguments.rounds} rounds",
        "",
        f"first token of the first request:  {first:8.1f} ms",
        f"first token of the second request: {second:8.1f} ms",
        f"first / second: {median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})",
    ]
    return "\n".join(lines) + "\n"


def first_token_ms(engine: Engine, prompt: list[int]) -> float:
    """Return the time to the first token of a request, which is then run to its end."""
    began = time.perf_counter()
    stream = engine.stream(prompt, PARAMS)
    next(stream)
    elapsed_s = time.perf_counter() - began
    for _ in stream:
        pass
    return 1000 * elapsed_s


if __name__ == "__main__":
    main()
