"""Try every figure of samples on people's texts with faults: the ladder that a figure must pass before it has a weight.

Copies of held-out texts get faults at rising doses: words that the model draws at temperature 1.3 in their place, names
of other texts, sentences of other texts, and sentences in another order. Two changes should not matter: half the
length, and a typo of one letter in 1 % of the words. Run it in the folder of a project that has been through `export`.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from corruptions import DOSES, Text, change_harmlessly, corrupt
from numpy.typing import NDArray

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError, report_errors
from pipeline.evaluation.samples import SLOTS, Sample, draw_samples, human_samples, make_meter
from pipeline.params.file import load_section
from pipeline.params.samples import SamplesParams
from pipeline.params.section import PARAMS_FILE
from pipeline.params.tune import TuneParams
from pipeline.progress import progress
from pipeline.quality.comparison import MAUVE_SEEDS, SampleFigures, measure_set
from pipeline.quality.distance import BETTER_ABOVE, FAULTS, KINDS_OF_INVENTED_WORDS
from pipeline.quality.jackknife import jackknife_error, leave_each_out
from pipeline.quality.mauve import Buckets, mauve_of_buckets, sort_in_buckets
from pipeline.tokens import load_tokens, tokenizer_sha256

SET_TEXTS = 8
TEMPERATURES = (0.8, 1.1)
SAMPLES = 32
"""The samples drawn at each temperature."""
SET_FIGURES = ("distinct_1", "distinct_2", "distinct_3", "zipf", "self_bleu", "mauve")
"""The figures that one text does not have."""

LEAST_AUC = 0.8
"""The AUC that a figure must reach at the highest dose, between sets of `SET_TEXTS` texts."""
LIMITS = {"half": 0, "typos": 1}
"""The dose, by its place in `DOSES`, that must move a figure further than a change that should not matter. A typo is an
invented word, so the limit is the dose that changes ten times as many words."""
LEAST_DIFFERENCE = 2.0
"""How many standard errors samples at the two temperatures must differ."""
_LOW, _HIGH = TEMPERATURES
RULE = f"""\
Rule. A figure passes if, with the corruption that it tells best,
  1. its AUC over sets of {SET_TEXTS} is at least {LEAST_AUC} at dose {DOSES[-1]}, or as far below a half,
  2. its mean moves further in one direction at every dose,
  3. half the length moves it less than dose {DOSES[LIMITS["half"]]}, and typos less than dose {DOSES[LIMITS["typos"]]},
  4. {SAMPLES} samples at {_LOW} and at {_HIGH} differ by at least {LEAST_DIFFERENCE:g} standard errors.
A figure that counts only above people's or only below must move that way in 1 and 4. One that nothing here moves is not
tried: no copy has its fault."""

Floats = NDArray[np.float64]
Rows = Sequence[SampleFigures]
Figures = dict[str, float]


@dataclass(frozen=True)
class Evidence:
    """All measured texts that the figures are judged by."""

    original: list[SampleFigures]
    corrupted: dict[str, list[list[SampleFigures]]]
    """Those of each dose, by the name of the corruption."""
    harmless: dict[str, list[SampleFigures]]
    cold: list[SampleFigures]
    hot: list[SampleFigures]


@dataclass(frozen=True)
class Ladder:
    """What a figure says about one corruption: one number per dose."""

    text_auc: list[float] | None
    """The AUC between single texts; None for a figure that one text does not have."""
    set_auc: list[float]
    shifts: list[float]
    """How far the mean over the sets moves."""

    def strength(self, direction: int) -> float:
        """Return the AUC at the highest dose; in whichever direction the figure moves if `direction` is 0."""
        up, down = self.set_auc[-1], 1 - self.set_auc[-1]
        return {1: up, -1: down, 0: max(up, down)}[direction]

    @property
    def is_monotone(self) -> bool:
        steps = np.diff([0.0, *self.shifts]) * math.copysign(1, self.shifts[-1])
        return bool((steps > 0).all())


@dataclass(frozen=True)
class Result:
    """All that is found of one figure."""

    name: str
    ladders: dict[str, Ladder]
    harmless_shifts: dict[str, float]
    difference: float
    """The difference between samples at the two temperatures, hot minus cold, in standard errors."""
    levels: list[float | None]
    """The figure of people's texts, and of the samples at the two temperatures."""

    @property
    def direction(self) -> int:
        """Return 1 if only more than people have counts against samples, -1 if only less, and 0 if both do."""
        if self.name in (*FAULTS, *KINDS_OF_INVENTED_WORDS):
            return -1 if self.name in BETTER_ABOVE else 1
        return 0

    @property
    def best(self) -> str:
        """Return the corruption that it tells best."""

        def rank(name: str) -> tuple[float, bool]:
            return self.ladders[name].strength(self.direction), self.ladders[name].is_monotone

        return max(self.ladders, key=rank)

    def harm(self, change: str) -> float:
        """Return how far a harmless change moves the figure, relative to its limit: a dose of the best corruption."""
        shift, dose = abs(self.harmless_shifts[change]), abs(self.ladders[self.best].shifts[LIMITS[change]])
        return 0.0 if shift == 0 else shift / dose if dose else math.inf

    @property
    def is_tried(self) -> bool:
        """Return whether anything moves the figure at all."""
        return self.difference != 0 or any(any(ladder.shifts) for ladder in self.ladders.values())

    @property
    def failures(self) -> list[int]:
        """Return the numbers of the conditions of `RULE` that it fails."""
        ladder = self.ladders[self.best]
        passes = (
            ladder.strength(self.direction) >= LEAST_AUC,
            ladder.is_monotone,
            max(map(self.harm, self.harmless_shifts)) < 1,
            (self.difference * self.direction if self.direction else abs(self.difference)) >= LEAST_DIFFERENCE,
        )
        return [number for number, passed in enumerate(passes, start=1) if not passed]

    @property
    def verdict(self) -> str:
        if not self.is_tried:
            return "not tried"
        return f"fails {' '.join(map(str, self.failures))}" if self.failures else f"yes, {self.best}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=RULE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path(), help="folder of the project (default: this one)")
    parser.add_argument("--samples", type=int, default=10**9, help="the most texts per split (default: all)")
    parser.add_argument("--sets", type=int, default=100, help="random sets of texts per dose (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file for the tables, besides the terminal")
    arguments = parser.parse_args()
    with report_errors():
        tables = run(arguments.project, samples=arguments.samples, sets=arguments.sets, seed=arguments.seed)
        print(tables, end="")
        if arguments.out:
            arguments.out.write_text(tables, encoding="utf-8")


def run(project: Path, *, samples: int, sets: int, seed: int) -> str:
    """Return the tables. Raises `UserError` if there are too few texts."""
    return report(judge(gather(project, samples=samples, seed=seed), sets=sets, seed=seed), sets=sets)


def gather(project: Path, *, samples: int, seed: int) -> Evidence:
    """Measure people's texts, their changed copies, and samples at the two temperatures."""
    params = load_section("samples", SamplesParams, project / PARAMS_FILE)
    max_new_tokens = load_section("tune", TuneParams, project / PARAMS_FILE).max_new_tokens
    engine = project / "out" / "export" / "engine"
    generator = TextGenerator.load(engine, slots=SLOTS)
    tokenizer = generator.tokenizer
    training = load_tokens(project / "out" / "tokenize" / "train", tokenizer_sha256(engine))
    meter = make_meter(Engine.load(project / "out" / "export" / "base" / "engine"), engine, tokenizer, training, params)

    def measure(texts: Sequence[Text]) -> list[SampleFigures]:
        # Each text is tokenized, as it may have been changed.
        return meter.measure(
            [
                Sample(text.prompt, text.text, tokenizer.encode(text.text).ids, "stop" if text.finished else "length")
                for text in texts
            ]
        )

    people = [
        sample
        for split in ("validation", "test")
        for sample in human_samples(
            project / "out" / "prepare" / f"{split}.jsonl",
            generator,
            SamplingParams(max_new_tokens=max_new_tokens),
            samples=samples,
            prompt_words=params.prompt_words,
        )
        if len(sample.token_ids) > 1
    ]
    if len(people) < 4:
        raise UserError(f"samples: {len(people)} texts are too few to compare; use at least 4")
    texts = [Text(sample.prompt, sample.text, sample.finish_reason == "stop") for sample in people]
    _log(f"{len(texts)} texts of people, {len(meter.lexicon):,} known words; drawing words")
    corrupted = corrupt(texts, generator, seed)
    _log("measuring the copies")
    bar = progress(total=len(corrupted) * len(DOSES), description="copies", unit="dose")
    measured: dict[str, list[list[SampleFigures]]] = {}
    for name, doses in corrupted.items():
        measured[name] = []
        for own in doses.values():
            measured[name].append(measure(own))
            bar.update()
    bar.close()
    harmless = {name: measure(own) for name, own in change_harmlessly(texts, generator, seed).items()}
    _log("drawing samples")
    prompts = [sample.prompt for sample in people[:SAMPLES]]
    decodings = [
        SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, context_overflow="slide")
        for temperature in TEMPERATURES
    ]
    cold, hot = (meter.measure(draw_samples(generator, prompts, decoding, seed=seed)) for decoding in decodings)
    return Evidence(measure(texts), measured, harmless, cold, hot)


def judge(evidence: Evidence, *, sets: int, seed: int) -> dict[str, Result]:
    """Return what is found of each figure."""
    original = evidence.original
    comparison = SetComparison(original, sets, seed)
    differences = compare_temperatures(evidence.cold, evidence.hot, original[: len(evidence.cold)])
    ladders = {name: climb(comparison, doses) for name, doses in evidence.corrupted.items()}
    shifts = {name: comparison.shifts(own) for name, own in evidence.harmless.items()}
    levels = [measure_texts(rows) for rows in (original, evidence.cold, evidence.hot)]
    return {
        name: Result(
            name,
            {corruption: own[name] for corruption, own in ladders.items()},
            {change: own[name] for change, own in shifts.items()},
            differences[name],
            [own.get(name) for own in levels],
        )
        for name in differences
    }


class SetComparison:
    """The figures of random sets of texts, and of the same sets of changed copies."""

    def __init__(self, original: Rows, sets: int, seed: int) -> None:
        chance = np.random.default_rng(seed)
        size = min(SET_TEXTS, len(original) // 2)
        self._original = original
        self._own, self._other = ([chance.permutation(len(original))[:size] for _ in range(sets)] for _ in range(2))
        self._levels = self._measure_sets(original, self._own)
        self._apart = self._measure_sets(original, self._other)
        self._texts = [figures_of_text(row) for row in original]

    def ladder_step(self, changed: Rows) -> tuple[Figures, Figures, Figures]:
        """Return per figure the AUC between texts, that between sets, and the shift of the mean of the same sets."""
        levels = self._measure_sets(changed, self._own)
        texts = [figures_of_text(row) for row in changed]
        return (
            {name: auc(_column(self._texts, name), _column(texts, name)) for name in texts[0]},
            {name: auc(_column(self._apart, name), _column(levels, name)) for name in levels[0]},
            self._shift(levels),
        )

    def shifts(self, changed: Rows) -> Figures:
        return self._shift(self._measure_sets(changed, self._own))

    def _shift(self, levels: Sequence[Figures]) -> Figures:
        return {name: float((_column(levels, name) - _column(self._levels, name)).mean()) for name in self._levels[0]}

    def _measure_sets(self, rows: Rows, sets: Sequence[NDArray[np.int64]]) -> list[Figures]:
        """Measure each set; its MAUVE is against the originals of all other texts."""
        found = []
        for members in progress(sets, description="sets", unit="set"):
            own = [rows[index] for index in members]
            others = [row for index, row in enumerate(self._original) if index not in members]
            figures = measure_texts(own)
            mauves = [mauve_of_buckets(buckets) for buckets in _buckets(own, others)]
            found.append(figures | {"mauve": float(np.mean(mauves))})
        return found


def climb(comparison: SetComparison, doses: Sequence[Rows]) -> dict[str, Ladder]:
    """Return the ladder of each figure from the rows at each dose."""
    steps = [comparison.ladder_step(rows) for rows in doses]
    return {
        name: Ladder(
            None if name in SET_FIGURES else [text_auc[name] for text_auc, _, _ in steps],
            [set_auc[name] for _, set_auc, _ in steps],
            [shift[name] for _, _, shift in steps],
        )
        for name in steps[0][1]
    }


def figures_of_text(row: SampleFigures) -> Figures:
    """Return the figures that one text has, under the names of the figures of a set."""
    found = measure_texts([row])
    return {name: value for name, value in found.items() if name not in SET_FIGURES}


def measure_texts(rows: Rows) -> Figures:
    """Return all figures of a set but MAUVE."""
    figures = asdict(measure_set(rows))
    del figures["mauve"]
    return figures


def compare_temperatures(cold: Rows, hot: Rows, people: Rows) -> Figures:
    """Return how far the figures of the two sets differ, in standard errors, if prompts were others."""
    found = [_buckets(own, people) for own in (cold, hot)]

    def difference(kept: Sequence[int]) -> Figures:
        sides = []
        for rows, own in zip((cold, hot), found, strict=True):
            places = np.array(kept)
            parts = [buckets._replace(own=buckets.own[places], human=buckets.human[places]) for buckets in own]
            mauve = float(np.mean([mauve_of_buckets(part) for part in parts]))
            sides.append(measure_texts([rows[index] for index in kept]) | {"mauve": mauve})
        return {name: sides[1][name] - sides[0][name] for name in sides[0]}

    every = range(len(cold))
    whole, without = difference(every), leave_each_out(every, difference)
    names = list(whole)
    errors = jackknife_error(np.array([[own[name] for name in names] for own in without])).tolist()
    return {
        name: whole[name] / error if error > 0 else 0.0 if whole[name] == 0 else math.copysign(math.inf, whole[name])
        for name, error in zip(names, errors, strict=True)
    }


def auc(before: Floats, after: Floats) -> float:
    """Return how often a value of `after` is above one of `before`; equal ones count half."""
    differences = after[:, None] - before[None, :]
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def report(results: Mapping[str, Result], *, sets: int) -> str:
    """Return the tables as text and as Markdown."""
    corruptions = list(next(iter(results.values())).ladders)
    header = ["figure", *corruptions, *LIMITS, "hot - cold", "people", *map(str, TEMPERATURES), "passes"]
    rows = [
        [
            own.name,
            *(_rung(ladder.set_auc, ladder.is_monotone) for ladder in own.ladders.values()),
            *(f"{own.harm(change):.1f}" for change in LIMITS),
            f"{own.difference:+.1f}",
            *map(_number, own.levels),
            own.verdict,
        ]
        for own in results.values()
    ]
    text_header = ["figure", *corruptions]
    text_rows = [
        [own.name, *(_rung(ladder.text_auc or []) for ladder in own.ladders.values())]
        for own in results.values()
        if own.name not in SET_FIGURES
    ]
    intro = f"""\
AUC of sets of {SET_TEXTS} corrupted texts against as many originals ({sets} sets each), at doses \
{", ".join(map(str, DOSES))}; * not monotone.
half, typos   shift by a harmless change, relative to its limit (rule 3)
hot - cold    difference of samples at temperatures {TEMPERATURES[1]} and {TEMPERATURES[0]}, in standard errors
people, ...   the figure of all texts of people, and of the samples at each temperature"""
    parts = [intro, RULE, _table(header, rows), "AUC between single texts", _table(text_header, text_rows)]
    return "\n\n".join([*parts, _markdown(header, rows), _markdown(text_header, text_rows)]) + "\n"


def _rung(values: Sequence[float], is_monotone: bool = True) -> str:
    return " ".join(f"{value:.2f}" for value in values) + ("" if is_monotone else "*")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (header, ["-" * width for width in widths], *rows)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def _buckets(own: Rows, others: Rows) -> list[Buckets]:
    states = [np.stack([row.state for row in side]) for side in (own, others)]
    return [sort_in_buckets(*states, seed=seed) for seed in MAUVE_SEEDS]


def _column(figures: Sequence[Figures], name: str) -> Floats:
    return np.array([own[name] for own in figures])


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
