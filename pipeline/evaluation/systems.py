"""The systems that are compared: people, and the models with several decodings, each with samples and figures."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.decoding import SamplingParams
from pipeline.engine.text import TextGenerator
from pipeline.evaluation.samples import Meter, Sample, character_spans, draw_samples
from pipeline.params.evaluate import EvaluateParams
from pipeline.quality.comparison import Comparison, SampleFigures, compare, measure_people
from pipeline.quality.distance import SetFigures
from pipeline.quality.memorization import mark_copies
from pipeline.quality.repetition import mark_repeats

HUMAN = "human"
COPY_TOKENS = 10
"""Tokens in a row that must occur in the training text to be marked as a copy."""
REPEAT_TOKENS = 4
"""Tokens in a row that must occur earlier in the sample to be marked as repeated."""


@dataclass(frozen=True)
class System:
    """People, or a model with a decoding: a sample per prompt, and the figures of each."""

    samples: list[Sample]
    figures: list[SampleFigures]


@dataclass(frozen=True)
class ModelSystem(System):
    """A model with a decoding, compared with people's texts."""

    decoding: SamplingParams
    comparison: Comparison


def decodings_of(params: EvaluateParams, found: Mapping[str, Any], *, holds_index: bool) -> dict[str, SamplingParams]:
    """Return the decodings to compare, of the fine-tuned model except `untuned_base`, which has the hand-set one.

    `found` holds the values that `tune` found. Without an index in the engine `guarded` is left out, with a line that
    says so.
    """
    hand_set = params.decoding
    decodings = {"hand_set": hand_set, "tuned": replace_searched(hand_set, found)}
    if params.guard_tokens is not None and holds_index:
        decodings["guarded"] = replace(decodings["tuned"], max_verbatim_tokens=params.guard_tokens)
    elif params.guard_tokens is not None:
        print("evaluate.guard_tokens: left out, as the engine holds no index (export.verbatim_index)", file=sys.stderr)
    pure = SamplingParams(max_new_tokens=hand_set.max_new_tokens, context_overflow=hand_set.context_overflow)
    decodings["greedy"] = replace(pure, temperature=0.0)
    decodings["sampling"] = pure
    decodings["untuned_base"] = hand_set
    return decodings


def replace_searched(hand_set: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    """Return the hand-set decoding with every searched parameter as `tune` found it, neutral values too."""
    return SamplingParams.from_mapping({**hand_set.to_mapping(), **values})


def run_systems(
    generators: Mapping[str, TextGenerator],
    people: System,
    decodings: Mapping[str, SamplingParams],
    meter: Meter,
    seed: int,
) -> dict[str, ModelSystem]:
    """Draw, measure and compare the samples of every decoding, for the prompts of `people`.

    `generators` are those of `base` and `finetuned`.
    """
    human = measure_people(people.figures)
    prompts = [sample.prompt for sample in people.samples]
    systems: dict[str, ModelSystem] = {}
    for name, decoding in decodings.items():
        generator = generators["base" if name == "untuned_base" else "finetuned"]
        samples = draw_samples(generator, prompts, decoding, seed=seed, description=f"samples: {name}")
        figures = meter.measure(samples)
        systems[name] = ModelSystem(samples, figures, decoding, compare(figures, human, intervals=True))
    return systems


def choose_decoding(tuned: Comparison, hand_set: Comparison) -> dict[str, Any]:
    """Keep the tuned decoding if it has fewer faults above people's level than the hand-set one.

    If both have equally many, as when neither has any, keep it if it is nearer to people with 95 % confidence.
    """
    difference, low, high = tuned.difference(hand_set)
    excess, hand_set_excess = tuned.distance.excess, hand_set.distance.excess
    keeps_tuned = high < 0 if excess == hand_set_excess else excess < hand_set_excess
    return {
        "kept": "tuned" if keeps_tuned else "hand_set",
        "tuned_excess": excess,
        "hand_set_excess": hand_set_excess,
        "difference": difference,
        "difference_low": low,
        "difference_high": high,
    }


def summarize_people(people: System) -> dict[str, float | None]:
    """Return the figures of people's texts."""
    return _summarize(people) | rename_perplexity(measure_people(people.figures).figures)


def summarize_model(system: ModelSystem) -> dict[str, float | None]:
    """Return the figures of a model's samples, and their distance from people's texts."""
    distance, low, high = system.comparison.interval()
    return {
        **_summarize(system),
        **rename_perplexity(system.comparison.figures),
        "excess": system.comparison.distance.excess,
        "distance": distance,
        "distance_low": low,
        "distance_high": high,
        "too_tame": system.comparison.distance.too_tame,
        "too_wild": system.comparison.distance.too_wild,
    }


def _summarize(system: System) -> dict[str, float | None]:
    """Return the figures that are not part of the distance."""
    return {
        "longest_copy_tokens": max(figures.copy_tokens for figures in system.figures),
        "finished_share": float(np.mean([sample.finish_reason == "stop" for sample in system.samples])),
    }


def rename_perplexity(scores: SetFigures) -> dict[str, float | None]:
    """Return the figures of the distance, with `perplexity` renamed to `base_perplexity`: the base computes it.

    Without `form_share` if people's texts do not have the form.
    """
    return {
        ("base_perplexity" if name == "perplexity" else name): value
        for name, value in asdict(scores).items()
        if name != "form_share" or value is not None
    }


def sample_rows(
    systems: Mapping[str, System], tokenizer: Tokenizer, training_ids: NDArray[np.unsignedinteger], seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `samples.jsonl`, system by system, each in the order of the prompts."""
    for name, system in systems.items():
        copied = mark_copies([sample.token_ids for sample in system.samples], training_ids, COPY_TOKENS)
        decoding = system.decoding.to_mapping() if isinstance(system, ModelSystem) else None
        for index, (sample, figures) in enumerate(zip(system.samples, system.figures, strict=True)):
            repeated = mark_repeats(sample.token_ids, REPEAT_TOKENS)
            yield {
                "system": name,
                "prompt": sample.prompt,
                "text": sample.text,
                "tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason,
                "longest_copy_tokens": figures.copy_tokens,
                "rep_4": figures.rep[-1],
                "invented_words": figures.faults.invented_words,
                "in_form": figures.in_form,
                "looping": figures.looping,
                "copied_spans": character_spans(tokenizer, sample, copied[index]),
                "repeated_spans": character_spans(tokenizer, sample, repeated),
                "seed": None if decoding is None else seed + index,
                "decoding": decoding,
            }


def copies_table(systems: Mapping[str, System]) -> list[list[str]]:
    """Return a table of the longest verbatim copy in each sample, a row per rank."""
    lengths = [sorted((own.copy_tokens for own in system.figures), reverse=True) for system in systems.values()]
    ranks = enumerate(zip(*lengths, strict=True), start=1)
    return [["rank", *systems], *([str(rank), *map(str, row)] for rank, row in ranks)]
