"""Trying decoding parameters: samples of a trial, their distance from people's texts, and the finals of the best."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
from optuna.trial import TrialState

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.text import TextGenerator
from pipeline.evaluation.samples import SLOTS, Meter, describe_missing_form, draw_samples, human_samples, make_meter
from pipeline.evaluation.search import Search, Values
from pipeline.params.samples import SamplesParams
from pipeline.params.tune import TuneParams
from pipeline.progress import progress
from pipeline.quality.comparison import Comparison, Human, SampleFigures, compare, measure_people
from pipeline.tokens import load_tokens, tokenizer_sha256

FINAL_ROUNDS = 2
"""Sets of new samples drawn with each finalist."""
PRUNABLE_PROMPTS = 8
"""With fewer prompts, half of them say too little to give a trial up."""


@dataclass(frozen=True)
class Trial:
    """One set of decoding parameters that was tried: a row of `trials.json`."""

    number: int
    state: Literal["complete", "pruned"]
    prompts: int
    """Prompts that samples were drawn for: half of them if the trial was pruned."""
    values: Values
    excess: float
    """The faults above people's level; 0 if the samples pass."""
    distance: float
    """Distance of the samples from people's texts."""
    too_tame: float
    """The part of the distance that comes from repetition and predictability."""
    too_wild: float
    """The part of the distance that comes from babbling."""
    scores: dict[str, float]
    """The figures that the distance is made of."""


@dataclass(frozen=True)
class Bench:
    """What every set of parameters is tried on."""

    generator: TextGenerator
    meter: Meter
    prompts: list[str]
    human: Human
    human_half: Human | None
    """The human side of the first half of the prompts; None if that is too little to prune a trial by."""
    params: TuneParams

    @property
    def half(self) -> int:
        return len(self.prompts) // 2

    def draw(self, values: Mapping[str, Any], start: int, end: int, round_: int = 0) -> list[SampleFigures]:
        """Draw and measure samples of the prompts from `start` to `end`; each round has its own random numbers."""
        decoding = SamplingParams.from_mapping({**values, "max_new_tokens": self.params.max_new_tokens})
        seed = self.params.seed + round_ * len(self.prompts) + start
        return self.meter.measure(draw_samples(self.generator, self.prompts[start:end], decoding, seed=seed))


def set_up(export: Path, documents: Path, tokens: Path, params: TuneParams, samples: SamplesParams) -> Bench:
    """Load the models, and measure what people wrote."""
    generator = TextGenerator.load(export / "engine", slots=SLOTS)
    people = human_samples(
        documents,
        generator,
        SamplingParams(max_new_tokens=params.max_new_tokens),
        samples=params.samples,
        prompt_words=samples.prompt_words,
    )
    training = load_tokens(tokens, tokenizer_sha256(export / "engine"))
    base = Engine.load(export / "base" / "engine")
    meter = make_meter(base, export / "engine", generator.tokenizer, training, samples)
    human = measure_people(meter.measure(people))
    if not human.has_form:
        print(describe_missing_form(len(people)), file=sys.stderr)
    half = human.first(len(people) // 2) if len(people) >= PRUNABLE_PROMPTS else None
    return Bench(generator, meter, [sample.prompt for sample in people], human, half, params)


def run_trials(bench: Bench, search: Search, record: Callable[[Trial, float], None]) -> list[Trial]:
    """Return the asked number of trials; those that an interrupted search has finished are not run again.

    `record` is called with each new trial and its start in seconds since the epoch, before the search counts it as
    finished: a trial whose recording was cut off is run again.
    """
    trials = [Trial(**finished.user_attrs["trial"]) for finished in search.finished]
    with progress(total=bench.params.trials, initial=len(trials), description="trials", unit="trial") as bar:
        while len(trials) < bench.params.trials:
            start_s = time.time()
            asked, values = search.ask()
            comparison, prompts = try_out(bench, values, pruner_of(asked))
            trial = Trial(
                number=len(trials),
                state="pruned" if prompts < len(bench.prompts) else "complete",
                prompts=prompts,
                values=values,
                excess=comparison.distance.excess,
                distance=comparison.distance.total,
                too_tame=comparison.distance.too_tame,
                too_wild=comparison.distance.too_wild,
                scores={name: value for name, value in asdict(comparison.figures).items() if value is not None},
            )
            asked.set_user_attr("trial", asdict(trial))
            record(trial, start_s)
            if trial.state == "pruned":
                search.study.tell(asked, state=TrialState.PRUNED)
            else:
                search.study.tell(asked, comparison.distance.score)
            trials.append(trial)
            bar.write(describe(trial), file=sys.stderr)
            bar.update()
    return trials


def pruner_of(asked: optuna.Trial) -> Callable[[int, float], bool]:
    """Return a function of prompts and score so far that says whether to give the trial up."""

    def should_prune(prompts: int, score: float) -> bool:
        asked.report(score, prompts)
        return asked.should_prune()

    return should_prune


def try_out(bench: Bench, values: Values, should_prune: Callable[[int, float], bool]) -> tuple[Comparison, int]:
    """Compare samples with people's texts; return the comparison and how many prompts it took: half if pruned."""
    first = bench.draw(values, 0, bench.half)
    if bench.human_half is not None:
        comparison = compare(first, bench.human_half)
        if should_prune(bench.half, comparison.distance.score):
            return comparison, bench.half
    samples = [*first, *bench.draw(values, bench.half, len(bench.prompts))]
    return compare(samples, bench.human), len(bench.prompts)


def describe(trial: Trial) -> str:
    """Return one line about the trial."""
    tried = ", ".join(f"{name} {value:g}" for name, value in trial.values.items())
    figures = f"{_describe_excess(trial.excess)}, distance {trial.distance:.1f}"
    if trial.state == "pruned":
        return f"trial {trial.number}: pruned after {trial.prompts} samples, {figures}; {tried}"
    sides = f"too tame {trial.too_tame:.1f}, too wild {trial.too_wild:.1f}"
    return f"trial {trial.number}: {figures} ({sides}); {tried}"


def _describe_excess(excess: float) -> str:
    return f"faults {excess:.1f} above people's" if excess else "faults as people's"


class Final(NamedTuple):
    """The figures of a finalist with new samples, the mean over the rounds; the least one is the best."""

    excess: float
    distance: float


def run_finals(bench: Bench, trials: Sequence[Trial], search: Search) -> dict[int, Final]:
    """Draw new samples with the best trials, and return their figures by number of the trial.

    The best of many trials was partly lucky; new samples reduce that luck.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    best = sorted(complete, key=lambda trial: (trial.excess, trial.distance))
    finals: dict[int, Final] = {}
    bar = progress(best[: bench.params.finalists], description="finalists", unit="trial")
    for trial in bar:
        note = f"final_{trial.number}"
        if note not in search.notes:
            rounds = range(1, FINAL_ROUNDS + 1)
            drawn = (bench.draw(trial.values, 0, len(bench.prompts), round_) for round_ in rounds)
            ranks = [compare(samples, bench.human).distance.rank for samples in drawn]
            search.note(note, np.mean(ranks, axis=0).tolist())
        final = finals[trial.number] = Final(*search.notes[note])
        bar.write(
            f"trial {trial.number}, new samples: {_describe_excess(final.excess)}, distance {final.distance:.1f}",
            file=sys.stderr,
        )
    return finals
