"""Measure what `max_verbatim_tokens` adds to the time per token: one engine, the same requests, several limits.

Each round generates the continuations once per limit, in an order that rotates from round to round. A limit is compared
with no limit in the same round; the report has the median and the quartiles of those ratios. Times are processor time
on one core, which other work on the machine disturbs least.
"""

import argparse
import statistics
import time
from pathlib import Path

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.errors import report_errors

LIMITS = (0, 0, 4, 8, 15, 30)
"""0 is no limit; the second 0 shows how much chance alone changes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, default=Path("out/export/engine"), help="default: %(default)s")
    parser.add_argument("--precision", default="int8", help="default: %(default)s, the fastest per token")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per continuation (default: %(default)s)")
    arguments = parser.parse_args()
    with report_errors():
        engine = Engine.load(arguments.engine, precision=arguments.precision, provider="cpu", threads=1)
        measure(engine, rounds=arguments.rounds, requests=arguments.requests, tokens=arguments.tokens)


def measure(engine: Engine, *, rounds: int, requests: int, tokens: int) -> None:
    seconds_per_token(engine, 0, requests, tokens)
    taken: list[list[float]] = [[] for _ in LIMITS]
    for turn in range(rounds):
        places = [(turn + step) % len(LIMITS) for step in range(len(LIMITS))]
        for place in places:
            taken[place].append(seconds_per_token(engine, LIMITS[place], requests, tokens))
    print(f"{rounds} rounds of {requests} continuations of {tokens} tokens, {engine.session.slots} at once, "
          f"{engine.session.precision}")  # fmt: skip
    print(f"no limit: {1e6 * statistics.median(taken[0]):.0f} us per token")
    for limit, own in zip(LIMITS[1:], taken[1:], strict=True):
        low, middle, high = statistics.quantiles(
            [100 * (mine / other - 1) for mine, other in zip(own, taken[0], strict=True)]
        )
        name = f"limit {limit}" if limit else "no limit again"
        print(f"{name:15s} {middle:+5.1f} % (quartiles {low:+.1f} to {high:+.1f})")


def seconds_per_token(engine: Engine, limit: int, requests: int, tokens: int) -> float:
    params = [
        SamplingParams(max_verbatim_tokens=limit, max_new_tokens=tokens, ignore_eos=True, temperature=0.8, top_k=50,
                       top_p=0.95, seed=seed)
        for seed in range(requests)
    ]  # fmt: skip
    start_s = time.process_time()
    done = engine.generate([[]] * requests, params)
    return (time.process_time() - start_s) / sum(len(completion.token_ids) for completion in done)


if __name__ == "__main__":
    main()
