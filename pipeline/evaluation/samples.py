"""Samples: continuations of the beginnings of documents, by their authors and by models, and their figures.

`tune` and `evaluate` both use this module, so that one measures what the other found.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.corpus.words import leading_words
from pipeline.decoding import SamplingParams
from pipeline.engine import Engine, Reading
from pipeline.engine.text import TextGenerator
from pipeline.files import read_jsonl
from pipeline.params.samples import SamplesParams
from pipeline.progress import progress
from pipeline.quality.comparison import SampleFigures, measure_sample
from pipeline.quality.faults import find_faults
from pipeline.quality.lexicon import Lexicon, collect_words, load_lexicon
from pipeline.quality.memorization import longest_copies
from pipeline.quality.perplexity import plan_windows
from pipeline.tokens import TokenArrays, prompt_ids

SLOTS = 16
"""The number of samples drawn at once."""


@dataclass(frozen=True)
class Sample:
    """A prompt, and the text that a model or the author wrote after it."""

    prompt: str
    text: str
    token_ids: list[int]
    """The tokens of the text, without the prompt."""
    finish_reason: str


@dataclass(frozen=True)
class Meter:
    """Measures samples one by one."""

    base: Engine
    """The model that gives perplexity and hidden states. It did not write the samples, unless they are the base's."""
    tokenizer: Tokenizer
    training_ids: NDArray[np.unsignedinteger]
    lexicon: Lexicon
    """The words that are not invented: those of the training text and of the base's."""
    params: SamplesParams
    """The definitions of a loop and of the data's form."""

    def measure(self, samples: Sequence[Sample]) -> list[SampleFigures]:
        """Return the figures of each sample."""
        copies = longest_copies([sample.token_ids for sample in samples], self.training_ids)
        return [self._measure(sample, int(copy)) for sample, copy in zip(samples, copies, strict=True)]

    def _measure(self, sample: Sample, copy_tokens: int) -> SampleFigures:
        reading = read_long(self.base, [*prompt_ids(self.tokenizer, sample.prompt), *sample.token_ids])
        own = reading.logprobs[len(reading.logprobs) - len(sample.token_ids) :]
        return measure_sample(
            sample.token_ids,
            faults=find_faults(
                sample.text, prompt=sample.prompt, lexicon=self.lexicon, finished=sample.finish_reason == "stop"
            ),
            copy_tokens=copy_tokens,
            loop_ngram_tokens=self.params.loop_ngram_tokens,
            loop_repeats=self.params.loop_repeats,
            in_form=re.search(self.params.form_pattern, sample.prompt + sample.text) is not None,
            logprob=float(own.sum()),
            state=reading.mean_state,
        )


def make_meter(base: Engine, engine: Path, tokenizer: Tokenizer, training: TokenArrays, params: SamplesParams) -> Meter:
    """Return the meter of a model: `engine` is the folder of its engine, `training` its training split."""
    # The engine lacks the words of the training text if it may not hold that text.
    lexicon = load_lexicon(engine) | collect_words(training.texts(tokenizer))
    return Meter(base, tokenizer, training.tokens, lexicon, params)


def read_long(engine: Engine, ids: Sequence[int]) -> Reading:
    """Read a text of any length; one longer than the context in windows that advance by half of it.

    The mean state is the mean over the windows, weighted by their tokens.
    """
    if len(ids) <= engine.context_length:
        return engine.read([ids])[0]
    windows = plan_windows(len(ids), engine.context_length, engine.context_length // 2)
    readings = engine.read([ids[window.start : window.end] for window in windows])
    logprobs = [window.select_scored(reading.logprobs) for window, reading in zip(windows, readings, strict=True)]
    tokens = [window.end - window.start for window in windows]
    return Reading(np.concatenate(logprobs), np.average([own.mean_state for own in readings], axis=0, weights=tokens))


def human_samples(
    documents: Path, generator: TextGenerator, decoding: SamplingParams, *, samples: int, prompt_words: int
) -> list[Sample]:
    """Return the first documents of a split, each cut into prompt and continuation like the models' samples.

    A continuation is as long at most as `decoding` and the context let a model's be. Returns as many as asked for, or
    fewer if the split has fewer: a document that came twice would count as repetition. Raises `UserError` if a prompt
    leaves no room in the context.
    """
    found = []
    for row in islice(read_jsonl(documents), samples):
        prompt = leading_words(row["text"], prompt_words)
        prompt_tokens = prompt_ids(generator.tokenizer, prompt)
        generator.check([prompt_tokens], decoding)
        budget = decoding.max_new_tokens or generator.engine.context_length
        if decoding.context_overflow == "end":
            budget = min(budget, generator.engine.context_length - len(prompt_tokens))
        ids = generator.tokenizer.encode(row["text"][len(prompt) :]).ids[:budget]
        reason = "length" if len(ids) == budget else "stop"
        found.append(Sample(prompt, generator.tokenizer.decode(ids), ids, reason))
    return found


def describe_missing_form(texts: int) -> str:
    """Return one line that says why `form_share` is left out."""
    return (
        f"samples.form_pattern: found in none of {texts} texts of people (cut as samples are), so form_share is "
        "left out; set it to what your texts look like, or to '' for any form"
    )


def character_spans(tokenizer: Tokenizer, sample: Sample, marked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the parts of a sample's text that its marked tokens spell, as half-open ranges of characters.

    `marked` is bool [tokens].
    """
    edges = np.flatnonzero(np.diff(marked.astype(np.int8), prepend=0, append=0))
    # A stop text is not part of the text, although its tokens were drawn.
    ends = [min(len(tokenizer.decode(sample.token_ids[:edge])), len(sample.text)) for edge in edges.tolist()]
    return [(start, end) for start, end in zip(ends[::2], ends[1::2], strict=True) if start < end]


def draw_samples(
    generator: TextGenerator,
    prompts: Sequence[str],
    decoding: SamplingParams,
    *,
    seed: int,
    description: str | None = None,
) -> list[Sample]:
    """Return a continuation of every prompt; sample i is keyed by `seed + i`, and does not depend on the others.

    With a `description`, a terminal shows the progress.
    """
    samples: list[Sample] = []
    with progress(total=len(prompts), description=description, unit="sample") as bar:
        for start in range(0, len(prompts), SLOTS):
            batch = prompts[start : start + SLOTS]
            seeded = [replace(decoding, seed=seed + start + index) for index in range(len(batch))]
            samples += [
                Sample(prompt, done.text, done.token_ids, done.finish_reason)
                for prompt, done in zip(batch, generator.complete(batch, seeded), strict=True)
            ]
            bar.update(len(batch))
    return samples
