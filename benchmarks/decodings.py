"""Draw the test prompts with a ladder of decodings, from greedy to hot, and rank them as `tune` does.

The samples go to a file that `benchmarks/blind.py` reads, so that the order can be held against that of readers: the
last line of the output is what its --against takes. Run it in the folder of a project that has been through `tune`.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.text import TextGenerator
from pipeline.errors import report_errors
from pipeline.evaluation.samples import SLOTS, human_samples, make_meter
from pipeline.evaluation.systems import System, replace_searched, run_systems
from pipeline.files import read_json, write_jsonl
from pipeline.params.evaluate import EvaluateParams
from pipeline.params.file import load_section
from pipeline.params.samples import SamplesParams
from pipeline.params.section import PARAMS_FILE
from pipeline.quality.comparison import Comparison
from pipeline.tokens import load_tokens, tokenizer_sha256

TEMPERATURES = (0.6, 0.8, 1.0, 1.2)
CANDIDATES = 4
COLUMNS = ("invented_words", "broken_quotes", "broken_sentences", "rep_2", "self_bleu", "perplexity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="file for the samples, JSON lines")
    parser.add_argument("--project", type=Path, default=Path(), help="folder of the project (default: this one)")
    parser.add_argument("--samples", type=int, default=10**9, help="the most prompts (default: all)")
    arguments = parser.parse_args()
    with report_errors():
        print(run(arguments.project, arguments.out, samples=arguments.samples))


def ladder(hand_set: SamplingParams, found: Mapping[str, Any]) -> dict[str, SamplingParams]:
    """Return the decodings by name: without filters at rising temperatures, and with those that compete."""
    pure = SamplingParams(max_new_tokens=hand_set.max_new_tokens, context_overflow=hand_set.context_overflow)
    tuned = replace_searched(hand_set, found)
    return {
        "greedy": replace(pure, temperature=0.0),
        **{f"T{temperature}": replace(pure, temperature=temperature) for temperature in TEMPERATURES},
        "hand_set": hand_set,
        "hand_set_hot": replace(hand_set, temperature=1.1),
        "tuned": tuned,
        f"tuned_best_of_{CANDIDATES}": replace(tuned, best_of=CANDIDATES),
    }


def run(project: Path, out: Path, *, samples: int) -> str:
    """Write the samples and return the table."""
    params = load_section("evaluate", EvaluateParams, project / PARAMS_FILE)
    sampling = load_section("samples", SamplesParams, project / PARAMS_FILE)
    engine = project / "out" / "export" / "engine"
    generator = TextGenerator.load(engine, slots=SLOTS)
    people = human_samples(
        project / "out" / "prepare" / "test.jsonl",
        generator,
        params.decoding,
        samples=samples,
        prompt_words=sampling.prompt_words,
    )
    training = load_tokens(project / "out" / "tokenize" / "train", tokenizer_sha256(engine))
    base = Engine.load(project / "out" / "export" / "base" / "engine")
    meter = make_meter(base, engine, generator.tokenizer, training, sampling)
    decodings = ladder(params.decoding, read_json(project / "out" / "tune" / "found.json")["balanced"])
    systems = run_systems(
        {"finetuned": generator}, System(people, meter.measure(people)), decodings, meter, params.seed
    )
    rows = [
        {"system": name, "prompt": sample.prompt, "text": sample.text}
        for name, system in systems.items()
        for sample in system.samples
    ]
    write_jsonl(out, rows)
    return describe({name: system.comparison for name, system in systems.items()})


def describe(found: Mapping[str, Comparison]) -> str:
    """Return a table of the decodings, the best first, and their ranks for `benchmarks/blind.py`."""
    order = sorted(found, key=lambda name: found[name].distance.rank)
    lines = [f"{'decoding':20} {'excess':>8} {'distance':>8} " + " ".join(f"{name:>16}" for name in COLUMNS)]
    for name in order:
        figures, distance = found[name].figures, found[name].distance
        lines.append(
            f"{name:20} {distance.excess:8.2f} {distance.total:8.2f} "
            + " ".join(f"{getattr(figures, column):16.3f}" for column in COLUMNS)
        )
    lines.append("--against " + ",".join(f"{name}={rank}" for rank, name in enumerate(order, start=1)))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
