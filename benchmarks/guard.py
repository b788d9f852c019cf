"""What `max_verbatim_tokens` adds to the time of a token: one engine, the same requests, with limits and without.

Each round draws the continuations once for every limit, in an order that turns from round to round; a limit is compared
with no limit within its round. What is told is the median of those ratios, and the quartiles. Processor time on one
core is taken: what else a machine does moves it least.
"""

import argparse
import statistics
import time
from pathlib import Path

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.errors import report_errors

LIMITS = (0, 0, 4, 8, 15, 30)
"""0 is none; the second of them tells what chance does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, default=Path("out/export/engine"), help="default: %(default)s")
    parser.add_argument("--precision", default="int8", help="default: %(default)s, in which a token takes least")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=256, help="of a continuation (default: %(default)s)")
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
    print(f"no limit: {1e6 * statistics.median(taken[0]):.0f} us a token")
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
