"""Measure what a decoding parameter costs per token of text: one engine, the same requests, and one setting at a time.

Each round generates the continuations once per setting, in an order that rotates from round to round. A setting is
compared with none in the same round; the report has the median and the quartiles of those ratios. Times are processor
time on one core, which other work on the machine disturbs least. Tokens of candidates that `best_of` drops are paid
for, but are no text. With `--requests 1` the candidates of a request fill slots that would be empty; with as many
requests as the engine has slots, they take turns.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.decoding import SamplingParams
from pipeline.engine.text import TextGenerator
from pipeline.errors import report_errors

PLAIN = SamplingParams(ignore_eos=True, temperature=0.8, top_k=50, top_p=0.95)
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "none again": {},  # How much chance alone changes.
    **{f"max_verbatim_tokens {limit}": {"max_verbatim_tokens": limit} for limit in (4, 8, 15, 30)},
    "min_p 0.08": {"min_p": 0.08},
    "top_n_sigma 3": {"top_n_sigma": 3.0},
    "eta_cutoff 0.0005": {"eta_cutoff": 0.0005},
    "no filter": {"top_k": 0, "top_p": 1.0},
    "top_n_sigma 3 alone": {"top_k": 0, "top_p": 1.0, "top_n_sigma": 3.0},
    "eta_cutoff 0.0005 alone": {"top_k": 0, "top_p": 1.0, "eta_cutoff": 0.0005},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
    **{f"best_of {candidates}": {"best_of": candidates} for candidates in (2, 4, 8)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, default=Path("out/export/engine"), help="default: %(default)s")
    parser.add_argument("--precision", default="int8", help="default: %(default)s, the fastest per token")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=8, help="default: %(default)s, one per slot")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per continuation (default: %(default)s)")
    arguments = parser.parse_args()
    with report_errors():
        generator = TextGenerator.load(arguments.engine, precision=arguments.precision, provider="cpu", threads=1)
        measure(generator, rounds=arguments.rounds, requests=arguments.requests, tokens=arguments.tokens)


def measure(generator: TextGenerator, *, rounds: int, requests: int, tokens: int) -> None:
    settings = {name: replace(PLAIN, max_new_tokens=tokens, **own) for name, own in SETTINGS.items()}
    names = list(settings)
    seconds_per_token(generator, settings["none"], requests)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds_per_token(generator, settings[name], requests))
    session = generator.engine.session
    print(
        f"{rounds} rounds of {requests} continuations of {tokens} tokens, {session.slots} at once, {session.precision}"
    )
    print(f"none: {1e6 * statistics.median(taken['none']):.0f} us per token")
    for name in names[1:]:
        low, middle, high = statistics.quantiles(
            [100 * (mine / other - 1) for mine, other in zip(taken[name], taken["none"], strict=True)]
        )
        print(f"{name:24s} {middle:+6.1f} % (quartiles {low:+.1f} to {high:+.1f})")


def seconds_per_token(generator: TextGenerator, params: SamplingParams, requests: int) -> float:
    start_s = time.process_time()
    done = generator.complete([""] * requests, [replace(params, seed=seed) for seed in range(requests)])
    return (time.process_time() - start_s) / sum(len(completion.token_ids) for completion in done)


if __name__ == "__main__":
    main()
