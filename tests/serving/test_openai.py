"""How the body of a request becomes decoding parameters, and how it is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.decoding import ModelDecoding, SamplingParams
from pipeline.serving.openai import (
    NEUTRAL,
    ApiError,
    CompletionRequest,
    DetokenizeRequest,
    validation_to_api_error,
)

OWN = SamplingParams(temperature=0.7, top_k=40, min_new_tokens=20, max_new_tokens=50, stop=("The end",))
FAITHFUL = SamplingParams(temperature=0.4, min_new_tokens=10, max_new_tokens=30, repetition_detection=(20, 3))


def sampling(own: SamplingParams = OWN, most_tokens: int | None = None, **fields: Any) -> SamplingParams:
    decoding = ModelDecoding(own, {"faithful": FAITHFUL, "adventurous": SamplingParams(temperature=1.2)})
    return CompletionRequest(**fields).sampling(decoding, most_tokens)


def test_unset_fields_are_the_models_own_decoding() -> None:
    assert sampling() == OWN
    assert sampling(temperature=None, stop=None, max_tokens=None, logit_bias=None) == OWN


def test_fields_override_the_models_own_decoding() -> None:
    found = sampling(
        temperature=0.0,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        top_n_sigma=3.5,
        eta_cutoff=0.001,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        no_repeat_ngram_size=3,
        max_verbatim_tokens=15,
        repetition_detection={"max_pattern_size": 20, "min_count": 3, "min_pattern_size": 2},
        logit_bias={"7": -100.0},
        max_tokens=30,
        min_tokens=2,
        stop=["x", "y"],
        stop_token_ids=[3],
        ignore_eos=True,
        seed=5,
        n=2,
        logprobs=0,
    )
    assert found == SamplingParams(
        temperature=0.0,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        top_n_sigma=3.5,
        eta_cutoff=0.001,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        no_repeat_ngram_size=3,
        max_verbatim_tokens=15,
        repetition_detection=(20, 3, 2),
        logit_bias={7: -100.0},
        max_new_tokens=30,
        min_new_tokens=2,
        stop=("x", "y"),
        stop_token_ids=(3,),
        ignore_eos=True,
        seed=5,
        n=2,
        logprobs=0,
    )


def test_a_preset_replaces_the_models_own_decoding() -> None:
    assert sampling(preset="faithful") == FAITHFUL
    assert sampling(preset=None) == OWN
    assert sampling(preset="faithful", temperature=0.9, seed=5) == replace(FAITHFUL, temperature=0.9, seed=5)
    off = sampling(preset="faithful", repetition_detection={"max_pattern_size": 0}, max_tokens=4)
    assert (off.repetition_detection[0], off.min_new_tokens, off.max_new_tokens) == (0, 4, 4)
    assert sampling(preset="adventurous", most_tokens=10) == SamplingParams(temperature=1.2, max_new_tokens=10)


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        ({"balanced": OWN, "faithful": FAITHFUL}, "preset: 'x' is none of balanced, faithful"),
        ({}, "preset: this model has no presets, got 'x'; leave it out"),
    ],
)
def test_an_unknown_preset_is_refused(presets: dict[str, SamplingParams], message: str) -> None:
    with pytest.raises(ApiError) as refusal:
        CompletionRequest(preset="x").sampling(ModelDecoding(OWN, presets), None)
    assert (refusal.value.status, refusal.value.message, refusal.value.param) == (400, message, "preset")


def test_loops_are_described_as_vllm_does() -> None:
    own = SamplingParams(repetition_detection=(20, 3))
    assert sampling(own).repetition_detection == (20, 3)
    assert sampling(own, repetition_detection={"max_pattern_size": 4, "min_count": 2}).repetition_detection == (4, 2, 1)
    off = sampling(own, repetition_detection={"max_pattern_size": 0})
    assert off.repetition_detection[0] == 0


def test_the_models_own_minimum_yields_to_a_shorter_request() -> None:
    assert sampling(max_tokens=5).min_new_tokens == 5
    with pytest.raises(ApiError, match=r"^min_tokens: 9 is out of range, must be at most max_tokens \(5\)$"):
        sampling(max_tokens=5, min_tokens=9)


def test_the_servers_limit_holds() -> None:
    assert sampling(most_tokens=10).max_new_tokens == 10
    assert sampling(SamplingParams(), most_tokens=10).max_new_tokens == 10
    with pytest.raises(ApiError, match=r"^max_tokens: 11 is more than 10, this server's limit$"):
        sampling(most_tokens=10, max_tokens=11)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1.0, "temperature: -1.0 is out of range, must be at least 0"),
        ("max_tokens", -1, "max_tokens: -1 is out of range, must be at least 1"),
        ("logit_bias", {"5": 101}, "logit_bias: 101 is out of range, must be in [-100, 100]"),
        ("stop", [""], "stop: expected texts that are not empty, got ''"),
        (
            "repetition_detection",
            {"max_pattern_size": 20},
            "repetition_detection: 0 is out of range, must be at least 2 (repetitions of the run)",
        ),
    ],
)
def test_a_range_is_that_of_the_decoding_parameters(field: str, value: object, message: str) -> None:
    with pytest.raises(ApiError) as refusal:
        sampling(**{field: value})
    assert (refusal.value.status, refusal.value.message, refusal.value.param) == (400, message, field)


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"temprature": 1}, "temprature", "temprature: no such field; /docs lists the fields"),
        ({"stream_options": {"x": 1}}, "stream_options", "stream_options.x: no such field; /docs lists the fields"),
        ({"temperature": "hot"}, "temperature", "temperature: input should be a valid number"),
        ({"preset": 5}, "preset", "preset: input should be a valid string"),
        ({"max_tokens": True}, "max_tokens", "max_tokens: input should be a valid integer"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: input should be a valid integer"),
        (
            {"stream_options": {"bad_words": 5}},
            "stream_options",
            "stream_options.bad_words: only [] is supported; leave it out",
        ),
        ({"prompt": 5}, "prompt", "prompt: expected a text, token ids, or a list of either, got 5"),
        ({"prompt": ["a", 5]}, "prompt", "prompt[1]: expected a text, got 5"),
        ({"prompt": [3, "a"]}, "prompt", "prompt[1]: expected a token id, got 'a'"),
        ({"prompt": [3, True]}, "prompt", "prompt[1]: expected a token id, got True"),
        ({"prompt": [3, -1]}, "prompt", "prompt[1]: expected a token id, got -1"),
        ({"prompt": [3, 2**31]}, "prompt", "prompt[1]: expected a token id, got 2147483648"),
        ({"prompt": [[3], 4]}, "prompt", "prompt[1]: expected token ids, got 4"),
        ({"prompt": [[3], [4, 5.0]]}, "prompt", "prompt[1][1]: expected a token id, got 5.0"),
        ({"prompt": [{}]}, "prompt", "prompt[0]: expected a token id, got {}"),
        (
            {"prompt": ["a", "\ud800"]},
            "prompt",
            "prompt[1]: contains half of a surrogate pair, which is not a character",
        ),
        ({"stop": 5}, "stop", "stop: expected a text or a list of texts, got 5"),
        ({"stop": ["a", 5]}, "stop", "stop[1]: expected a text, got 5"),
        ({"prompt": [3] * 65537}, "prompt", "prompt: 65,537 ids are more than the 65,536 that are taken"),
        ({"prompt": [[3], [3] * 65537]}, "prompt", "prompt[1]: 65,537 ids are more than the 65,536 that are taken"),
        ({"prompt": [[]] * 4097}, "prompt", "prompt: 4,097 prompts are more than the 4,096 that are taken"),
        ({"stop": ["a"] * 65}, "stop", "stop: 65 texts are more than the 64 that are taken"),
        (
            {"stop": ["a" * 1000, "b" * 25]},
            "stop",
            "stop: the texts have 1,025 characters together; at most 1,024 are taken",
        ),
        ({"stop_token_ids": ["a"]}, "stop_token_ids", "stop_token_ids[0]: expected a token id, got 'a'"),
        (
            {"stop_token_ids": [*range(1025)]},
            "stop_token_ids",
            "stop_token_ids: 1,025 ids are more than the 1,024 that are taken",
        ),
        ({"logit_bias": [5]}, "logit_bias", "logit_bias: expected an object of token ids and their biases, got [5]"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias: 'x' is not a token id"),
        ({"logit_bias": {"-5": 1}}, "logit_bias", "logit_bias: '-5' is not a token id"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias", "logit_bias: '\u0665' is not a token id"),
        ({"logit_bias": {"5": "x"}}, "logit_bias", "logit_bias.5: expected a number, got 'x'"),
        (
            {"logit_bias": {str(i): 1 for i in range(1025)}},
            "logit_bias",
            "logit_bias: 1,025 biases are more than the 1,024 that are taken",
        ),
        ({"seed": 2**63}, "seed", "seed: input should be less than 9223372036854775808"),
        ({"prompt": []}, "prompt", "prompt: the list is empty; give a prompt, '' to start from nothing"),
        ({"prompt": "\ud800"}, "prompt", "prompt: contains half of a surrogate pair, which is not a character"),
        ({"suffix": "x"}, "suffix", "suffix: the model continues a text and cannot fill a gap; leave it out"),
        (
            {"repetition_detection": {"max_size": 3}},
            "repetition_detection",
            "repetition_detection.max_size: no such field; /docs lists the fields",
        ),
        ({"logprobs": 21}, "logprobs", "logprobs: input should be less than or equal to 20"),
    ],
)
def test_a_body_is_refused_by_its_field(body: dict[str, object], field: str, message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        CompletionRequest.model_validate(body)
    error = validation_to_api_error(refusal.value.errors()[0])
    assert (error.status, error.param, error.message) == (400, field, message)


DIGITS = "5" * 5000


@pytest.mark.parametrize(
    "body",
    [
        {"logit_bias": {DIGITS: 1}},
        {DIGITS: 1},
        {"stream_options": {DIGITS: 1}},
        {"prompt": [DIGITS, 5]},
        {"prompt": [3, DIGITS]},
        {"prompt": [3, [3] * 100_000]},
        {"prompt": [10**4000]},
        {"stop": [[DIGITS]]},
        {"temperature": DIGITS},
        {"temperature": 10**4000},
        {"seed": 10**4000},
        {"model": DIGITS},
        {"preset": DIGITS},
        {"context_overflow": DIGITS},
    ],
)
def test_a_refusal_is_short_whatever_was_sent(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refusal:
        CompletionRequest.model_validate(body)
    error = validation_to_api_error(refusal.value.errors()[0])
    assert error.status == 400
    assert len(error.message) < 200
    assert error.param is not None


@pytest.mark.parametrize("length", [1000, 300_000])
@pytest.mark.parametrize(
    "body",
    [
        lambda length: {"prompt": [{}] * length},
        lambda length: {"prompt": [None] * length},
        lambda length: {"prompt": [["x"]] * length},
        lambda length: {"prompt": [1.5] * length},
        lambda length: {"prompt": ["a"] * length + [5]},
        lambda length: {"stop": [5] * length},
        lambda length: {"stop_token_ids": ["x"] * length},
        lambda length: {"allowed_token_ids": [None] * length},
        lambda length: {"logit_bias": {f"x{i}": 1 for i in range(length)}},
        lambda length: {f"x{i}": 1 for i in range(length)},
        lambda length: {"stream_options": {f"x{i}": 1 for i in range(length)}},
    ],
)
def test_only_the_first_bad_element_is_reported(body: Callable[[int], dict[str, Any]], length: int) -> None:
    """An error for each of them would take seconds, in which no other request is answered."""
    with pytest.raises(ValidationError) as refusal:
        CompletionRequest.model_validate(body(length))
    assert refusal.value.error_count() == 1


def test_token_ids_to_detokenize_are_checked_as_those_of_a_prompt() -> None:
    with pytest.raises(ValidationError) as refusal:
        DetokenizeRequest.model_validate({"tokens": [5, {}, {}]})
    error = validation_to_api_error(refusal.value.errors()[0])
    assert (error.message, error.param) == ("tokens[1]: expected a token id, got {}", "tokens")


def test_repeated_ids_and_stop_texts_count_once() -> None:
    asked = {"stop_token_ids": [5, 5, 4], "allowed_token_ids": [7, 7], "banned_token_ids": [9, 9], "stop": ["a", "a"]}
    params = sampling(**asked)
    assert (params.stop_token_ids, params.allowed_token_ids, params.banned_token_ids) == ((5, 4), (7,), (9,))
    assert params.stop == ("a",)


@pytest.mark.parametrize(("sent", "seed"), [(5, 5), (0, 0), (-1, None), (-2, 2**63 - 2), (-(2**63), 0)])
def test_any_seed_of_64_bits_is_taken(sent: int, seed: int | None) -> None:
    assert sampling(seed=sent).seed == seed


@pytest.mark.parametrize(
    "body",
    [
        {"best_of": 1, "n": 3},
        {"use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True, "add_special_tokens": True},
        {"guided_json": None, "prompt_logprobs": None, "truncate_prompt_tokens": None, "priority": 0, "bad_words": []},
        {"include_stop_str_in_output": False, "response_format": {"type": "text"}, "store": False, "suffix": ""},
        {"metadata": {"trace": "5"}, "request_id": "cmpl-5", "user": "me"},
        {"stream_options": {"include_obfuscation": False}},
        {"stream_options": {"include_obfuscation": True}, "store": True},
        {"seed": -1},
        {"prompt": None, "stop": "", "stop_token_ids": None, "logit_bias": None},
    ],
)
def test_a_field_with_its_default_value_changes_nothing(body: dict[str, Any]) -> None:
    assert sampling(**body) == replace(OWN, n=body.get("n", 1))


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_is_off_at_minus_one_as_in_vllm(top_k: int) -> None:
    assert sampling(top_k=top_k) == replace(OWN, top_k=0)


def test_what_vllm_takes_reaches_the_engine() -> None:
    asked = {"allowed_token_ids": [3, 4], "banned_token_ids": [5], "context_overflow": "slide"}
    assert sampling(**asked) == replace(OWN, allowed_token_ids=(3, 4), banned_token_ids=(5,), context_overflow="slide")
    with pytest.raises(ApiError, match=r"^max_tokens: must be set if context_overflow is slide"):
        sampling(SamplingParams(), context_overflow="slide")


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_field_that_would_do_something_is_refused_with_the_value_that_does_nothing(name: str) -> None:
    CompletionRequest.model_validate({name: NEUTRAL[name][0]})
    with pytest.raises(ValidationError) as refusal:
        CompletionRequest.model_validate({name: "other"})
    error = validation_to_api_error(refusal.value.errors()[0])
    message = f"{name}: only {json.dumps(NEUTRAL[name][0])} is supported; leave it out"
    assert (error.status, error.param, error.message) == (400, name, message)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (None, [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[]], [[]]),
    ],
)
def test_a_prompt_has_four_shapes(prompt: Any, prompts: Any) -> None:
    assert CompletionRequest(prompt=prompt).prompts() == prompts
