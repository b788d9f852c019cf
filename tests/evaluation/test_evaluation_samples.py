"""Samples as `tune` and `evaluate` draw, cut and measure them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError
from pipeline.evaluation import samples as evaluation_samples
from pipeline.evaluation.samples import (
    Meter,
    Sample,
    character_spans,
    draw_samples,
    human_samples,
    read_long,
)
from pipeline.files import write_jsonl
from pipeline.params.samples import SamplesParams
from pipeline.quality.lexicon import collect_words
from pipeline.tokens import load_tokenizer, prompt_ids


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def generator(tiny_engine: Engine, tokenizer: Tokenizer) -> TextGenerator:
    return TextGenerator(tiny_engine, tokenizer)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    file = tmp_path / "test.jsonl"
    write_jsonl(file, [{"text": text} for text in ("The lamp went out at last.", "Nobody — nobody said so.", "Short")])
    return file


def sample_of(text: str, tokenizer: Tokenizer, prompt: str = "") -> Sample:
    return Sample(prompt, text, tokenizer.encode(text).ids, "stop")


def test_people_are_cut_as_models_are(documents: Path, generator: TextGenerator, tokenizer: Tokenizer) -> None:
    found = human_samples(documents, generator, SamplingParams(max_new_tokens=6), samples=2, prompt_words=2)
    assert [sample.prompt for sample in found] == ["The lamp", "Nobody —"]
    for sample, rest in zip(found, (" went out at last.", " nobody said so."), strict=True):
        assert sample.token_ids == tokenizer.encode(rest).ids[:6]
        assert rest.startswith(sample.text)
        assert sample.finish_reason == "length"
    found = human_samples(documents, generator, SamplingParams(max_new_tokens=50), samples=2, prompt_words=2)
    assert {sample.finish_reason for sample in found} == {"stop"}


@pytest.mark.parametrize("prompt_words", [0, 1, 5])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_new_tokens": 9},
        {"max_new_tokens": 200},
        {"max_new_tokens": None},
        {"max_new_tokens": 200, "context_overflow": "slide"},
    ],
)
def test_the_context_cuts_people_where_it_cuts_models(
    limits: dict[str, Any], prompt_words: int, tmp_path: Path, generator: TextGenerator
) -> None:
    write_jsonl(tmp_path / "long.jsonl", [{"text": "Nobody on the rock had seen the lamp go out. " * 20}])
    decoding = SamplingParams(ignore_eos=True, **limits)
    (people,) = human_samples(tmp_path / "long.jsonl", generator, decoding, samples=1, prompt_words=prompt_words)
    (model,) = draw_samples(generator, [people.prompt], decoding, seed=1)
    assert (len(people.token_ids), people.finish_reason) == (len(model.token_ids), model.finish_reason)


def test_a_prompt_that_leaves_no_room_is_an_error(tmp_path: Path, generator: TextGenerator) -> None:
    write_jsonl(tmp_path / "long.jsonl", [{"text": "Nobody on the rock had seen the lamp go out. " * 20}])
    with pytest.raises(UserError, match="leave no room in the context of 64"):
        human_samples(tmp_path / "long.jsonl", generator, SamplingParams(), samples=1, prompt_words=100)


def test_people_are_cut_in_scripts_without_spaces(
    tmp_path: Path, generator: TextGenerator, tokenizer: Tokenizer
) -> None:
    texts = {"我们去了北京。天气很好。": "我们去了", "ภาษาไทยน่ารัก": "ภาษาไทย"}
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    limits = SamplingParams(max_new_tokens=500, context_overflow="slide")
    found = human_samples(tmp_path / "texts.jsonl", generator, limits, samples=2, prompt_words=4)
    assert [sample.prompt for sample in found] == list(texts.values())
    assert [sample.prompt + sample.text for sample in found] == list(texts)


def test_no_document_comes_twice(documents: Path, generator: TextGenerator) -> None:
    assert len(human_samples(documents, generator, SamplingParams(max_new_tokens=6), samples=50, prompt_words=2)) == 3


def test_samples_do_not_depend_on_each_other(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["The lamp", "Nobody", "", "They say the tide"]
    params = SamplingParams(max_new_tokens=9, temperature=0.9)
    together = draw_samples(generator, prompts, params, seed=5)
    monkeypatch.setattr(evaluation_samples, "SLOTS", 2)
    assert draw_samples(generator, prompts, params, seed=5) == together
    assert draw_samples(generator, prompts[2:], params, seed=7) == together[2:]
    assert draw_samples(generator, prompts, params, seed=6) != together


def test_a_sample_is_measured_by_the_base(
    generator: TextGenerator, tokenizer: Tokenizer, tiny_model: GPT2LMHeadModel
) -> None:
    training = tokenizer.encode("Nobody on the rock had seen the lamp.").ids
    params = SamplesParams(prompt_words=1, loop_ngram_tokens=3, loop_repeats=3, form_pattern=r"\AThey.+lamp")
    lexicon = collect_words(["They on the rock had seen"])
    meter = Meter(generator.engine, tokenizer, np.array(training, np.uint16), lexicon, params)
    sample = sample_of(" on the rock had seen lamps", tokenizer, "They")
    looping, empty = sample_of("ha ha ha ha", tokenizer), Sample("They", "", [], "stop")
    found = meter.measure([sample, looping, empty])
    shared = next(
        length
        for length in range(len(sample.token_ids), 0, -1)
        if str(sample.token_ids[:length])[1:-1] in str(training)[1:-1]
    )
    ids = prompt_ids(tokenizer, "They") + sample.token_ids
    with torch.inference_mode():
        made = tiny_model(torch.tensor([ids]), output_hidden_states=True)
    rows = torch.log_softmax(made.logits[0].double(), dim=-1)
    own = [float(rows[place - 1, ids[place]]) for place in range(len(ids) - len(sample.token_ids), len(ids))]
    assert found[0].copy_tokens == shared
    assert found[0].logprob == pytest.approx(math.fsum(own), rel=1e-4)
    np.testing.assert_allclose(found[0].state, made.hidden_states[-1][0].double().mean(dim=0).numpy(), atol=1e-4)
    assert [one.looping for one in found] == [False, True, False]
    assert [one.faults.invented_words for one in found] == [1, 4, 0]
    assert [one.faults.empty for one in found] == [False, False, True]
    assert [one.in_form for one in found] == [True, False, False]
    assert (found[2].logprob, found[2].copy_tokens) == (0, 0)


def test_a_text_beyond_the_context_is_read_in_windows(tiny_engine: Engine) -> None:
    ids = [(17 * index) % 300 for index in range(150)]
    reading = read_long(tiny_engine, ids)
    assert len(reading.logprobs) == 149
    # The first window is that of a text that fits, and later tokens see half of a context at least.
    np.testing.assert_array_equal(reading.logprobs[:63], tiny_engine.score([ids[:64]])[0])
    np.testing.assert_allclose(reading.logprobs[63:95], tiny_engine.score([ids[32:96]])[0][31:], atol=1e-6)
    assert np.isfinite(reading.mean_state).all()


def test_marked_tokens_are_found_in_the_text(tokenizer: Tokenizer) -> None:
    sample = sample_of("The lamp — went out", tokenizer)
    count = len(sample.token_ids)
    for start in range(count):
        for end in range(start + 1, count + 1):
            marked = np.zeros(count, bool)
            marked[start:end] = True
            spans = character_spans(tokenizer, sample, marked)
            text = tokenizer.decode(sample.token_ids[start:end]).strip("�")
            assert len(spans) <= 1
            assert text in "".join(sample.text[first:last] for first, last in spans) + "�"
    every = np.ones(count, bool)
    assert character_spans(tokenizer, sample, every) == [(0, len(sample.text))]
    assert character_spans(tokenizer, sample, ~every) == []


def test_what_a_stop_text_cut_off_is_not_marked(tokenizer: Tokenizer) -> None:
    whole = sample_of("The lamp went out", tokenizer)
    cut = Sample("", "The lamp", whole.token_ids, "stop")
    assert character_spans(tokenizer, cut, np.ones(len(whole.token_ids), bool)) == [(0, 8)]
    marked = np.zeros(len(whole.token_ids), bool)
    marked[-1] = True
    assert character_spans(tokenizer, cut, marked) == []
