"""`SamplingParams`: neutral values, types, ranges, the way to and from JSON, and what a model brings of them."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decoding import ModelDecoding, SamplingParams, merge_decoding, read_decoding
from pipeline.errors import UserError
from pipeline.files import write_json

OUT_OF_RANGE = [
    ("temperature", -0.1, "at least 0"),
    ("top_k", -1, "at least 0"),
    ("top_p", 0.0, r"in \(0, 1\]"),
    ("top_p", 1.01, r"in \(0, 1\]"),
    ("min_p", -0.01, r"in \[0, 1\]"),
    ("min_p", 1.01, r"in \[0, 1\]"),
    ("typical_p", 0.0, r"in \(0, 1\]"),
    ("typical_p", 1.01, r"in \(0, 1\]"),
    ("top_n_sigma", -0.1, "at least 0"),
    ("eta_cutoff", -0.01, r"in \[0, 1\)"),
    ("eta_cutoff", 1.0, r"in \[0, 1\)"),
    ("repetition_penalty", 0.0, "above 0"),
    ("presence_penalty", -2.1, r"in \[-2, 2\]"),
    ("presence_penalty", 2.1, r"in \[-2, 2\]"),
    ("frequency_penalty", -2.1, r"in \[-2, 2\]"),
    ("frequency_penalty", 2.1, r"in \[-2, 2\]"),
    ("no_repeat_ngram_size", -1, "at least 0"),
    ("max_verbatim_tokens", -1, "at least 0"),
    ("min_new_tokens", -1, "at least 0"),
    ("max_new_tokens", 0, "at least 1"),
    ("seed", -1, "at least 0"),
    ("seed", 2**63, r"below 2\*\*63"),
    ("n", 0, "at least 1"),
    ("best_of", 0, "at least 1"),
    ("logprobs", -1, "at least 0"),
]
NUMBERS = [
    *("temperature", "top_p", "min_p", "typical_p", "top_n_sigma", "eta_cutoff"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
]
WHOLE_NUMBERS = [
    *("top_k", "no_repeat_ngram_size", "max_verbatim_tokens", "min_new_tokens", "max_new_tokens"),
    *("seed", "n", "best_of", "logprobs"),
]
TOKEN_ID_LISTS = ["banned_token_ids", "allowed_token_ids", "stop_token_ids"]


def with_value(name: str, value: Any) -> SamplingParams:
    return SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value", "allowed"), OUT_OF_RANGE)
def test_value_out_of_range_names_field_value_and_range(name: str, value: float, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: {value} is out of range, must be {allowed}$"):
        with_value(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", 0.0), ("top_p", 1.0), ("min_p", 0.0), ("min_p", 1.0), ("typical_p", 1.0)),
        *(("top_n_sigma", 0.0), ("eta_cutoff", 0.0)),
        *(("presence_penalty", -2), ("presence_penalty", 2), ("frequency_penalty", -2), ("frequency_penalty", 2)),
        *(("seed", 0), ("seed", 2**63 - 1), ("max_new_tokens", 1), ("n", 1), ("logprobs", 0)),
    ],
)
def test_ends_of_a_range_belong_to_it(name: str, value: float) -> None:
    assert getattr(with_value(name, value), name) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "0.5", None, True, [1.0]])
@pytest.mark.parametrize("name", NUMBERS)
def test_number_must_be_a_finite_number_and_no_truth_value(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^{name}: expected a finite number, got "):
        with_value(name, value)


@pytest.mark.parametrize("value", [1.0, "1", True, [1]])
@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_number_must_be_an_integer_and_no_truth_value(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^{name}: expected a whole number, got "):
        with_value(name, value)


@pytest.mark.parametrize("name", ["max_new_tokens", "seed", "logprobs"])
def test_null_is_a_value_where_the_field_says_so(name: str) -> None:
    assert getattr(with_value(name, None), name) is None


@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_ignore_eos_is_a_truth_value(value: Any) -> None:
    with pytest.raises(UserError, match=r"^ignore_eos: expected true or false, got "):
        SamplingParams(ignore_eos=value)


def test_minimum_length_above_the_maximum_is_refused() -> None:
    with pytest.raises(UserError, match=r"^min_new_tokens: 6 is out of range, must be at most max_new_tokens \(5\)$"):
        SamplingParams(min_new_tokens=6, max_new_tokens=5)


@pytest.mark.parametrize("name", TOKEN_ID_LISTS)
def test_token_ids_are_a_list_of_whole_numbers_from_0(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: expected a list, got 5$"):
        with_value(name, 5)
    with pytest.raises(UserError, match=rf"^{name}: expected a whole number, got True$"):
        with_value(name, [True])
    with pytest.raises(UserError, match=rf"^{name}: -1 is out of range, must be at least 0$"):
        with_value(name, [3, -1])
    assert getattr(with_value(name, [3, 4]), name) == (3, 4)


@pytest.mark.parametrize("value", ["end", ["end", ""], [5]])
def test_stop_is_a_list_of_texts_that_are_not_empty(value: Any) -> None:
    with pytest.raises(UserError, match=r"^stop: expected "):
        SamplingParams(stop=value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([(5, 1.0)], r"expected token ids and their biases, got \[\(5, 1.0\)\]"),
        ({"5": 1.0}, "expected a whole number, got '5'"),
        ({-5: 1.0}, "-5 is out of range, must be at least 0"),
        ({5: math.nan}, "expected a finite number, got nan"),
        ({5: 100.5}, r"100.5 is out of range, must be in \[-100, 100\]"),
    ],
)
def test_logit_bias_maps_token_ids_to_biases_in_range(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^logit_bias: {message}$"):
        SamplingParams(logit_bias=value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (20, "expected a list, got 20"),
        ([20], r"expected the longest run and its repetitions, such as \[20, 3\], got \[20\]"),
        ([20, 3, 2, 1], r"expected the longest run and its repetitions, such as \[20, 3\], got \[20, 3, 2, 1\]"),
        ([20, 2.5], r"expected a whole number, got 2\.5"),
        ([-1, 3], "-1 is out of range, must be at least 0"),
        ([1025, 3], "1025 is out of range, must be at most 1024"),
        ([20, 1], r"1 is out of range, must be at least 2 \(repetitions of the run\)"),
        ([20, 3, 0], r"0 is out of range, must be in \[1, 20\] \(the shortest run that counts\)"),
        ([20, 3, 21], r"21 is out of range, must be in \[1, 20\] \(the shortest run that counts\)"),
    ],
)
def test_repetition_detection_is_two_or_three_numbers(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^repetition_detection: {message}$"):
        SamplingParams(repetition_detection=value)


@pytest.mark.parametrize("value", [[], [0], [0, 0, 1], [1, 2], [1024, 2], [20, 3, 1], [20, 3, 20]])
def test_repetition_detection_is_off_or_within_its_range(value: list[int]) -> None:
    params = SamplingParams(repetition_detection=tuple(value))
    assert SamplingParams.from_mapping(params.to_mapping()) == params


def test_unknown_name_is_refused_with_its_section() -> None:
    with pytest.raises(UserError, match=r"^evaluate\.decoding\.topk: no such decoding parameter; known are .*top_k"):
        SamplingParams.from_mapping({"topk": 5}, section="evaluate.decoding")


def test_wrong_value_is_named_with_its_section() -> None:
    with pytest.raises(UserError, match=r"^evaluate\.decoding\.top_p: 2 is out of range, must be in \(0, 1\]$"):
        SamplingParams.from_mapping({"top_p": 2}, section="evaluate.decoding")


def test_only_a_mapping_holds_decoding_parameters() -> None:
    with pytest.raises(UserError, match=r"^decoding: expected names and values, got \[1\]$"):
        SamplingParams.from_mapping([1], section="decoding")


def test_neutral_parameters_map_to_nothing() -> None:
    assert SamplingParams().to_mapping() == {}


token_ids = st.lists(st.integers(0, 2**20), max_size=4).map(tuple)


STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 100),
    "top_k": st.integers(0, 100),
    "top_p": st.floats(0, 1, exclude_min=True),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0, 1, exclude_min=True),
    "top_n_sigma": st.floats(0, 10),
    "eta_cutoff": st.floats(0, 1, exclude_max=True),
    "repetition_penalty": st.floats(0.1, 10),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "no_repeat_ngram_size": st.integers(0, 5),
    "max_verbatim_tokens": st.integers(0, 50),
    "repetition_detection": st.sampled_from([(), (20, 3), (5, 2, 4)]),
    "logit_bias": st.dictionaries(st.integers(0, 2**20), st.floats(-100, 100), max_size=3),
    "banned_token_ids": token_ids,
    "allowed_token_ids": token_ids,
    "min_new_tokens": st.integers(0, 50),
    "max_new_tokens": st.integers(50, 100),
    "context_overflow": st.sampled_from(["end", "slide"]),
    "stop": st.lists(st.text(min_size=1), max_size=3).map(tuple),
    "stop_token_ids": token_ids,
    "ignore_eos": st.booleans(),
    "seed": st.none() | st.integers(0, 2**63 - 1),
    "n": st.integers(1, 4),
    "best_of": st.sampled_from([1, 4, 7]),
    "logprobs": st.none() | st.integers(0, 20),
}


def test_every_parameter_is_tried() -> None:
    assert STRATEGIES.keys() == {field.name for field in fields(SamplingParams)}


@given(st.builds(SamplingParams, **STRATEGIES))
def test_parameters_survive_json(params: SamplingParams) -> None:
    assert SamplingParams.from_mapping(json.loads(json.dumps(params.to_mapping()))) == params


def test_logit_bias_survives_a_mapping() -> None:
    params = SamplingParams(logit_bias={7: -1.5, 9: 2.0})
    assert SamplingParams.from_mapping(params.to_mapping()) == params


OWN = SamplingParams(temperature=0.8, max_new_tokens=400)
PRESETS = {
    "balanced": SamplingParams(temperature=0.9, min_p=0.05, max_new_tokens=400),
    "faithful": SamplingParams(temperature=0.5, max_verbatim_tokens=15, max_new_tokens=400),
    "adventurous": SamplingParams(temperature=1.2, typical_p=0.9, logit_bias={7: -1.5}, stop=("The end",)),
}


def test_a_preset_is_whole_and_no_name_is_the_models_own() -> None:
    decoding = ModelDecoding(OWN, PRESETS)
    assert decoding.preset(None) == OWN
    assert {name: decoding.preset(name) for name in PRESETS} == PRESETS


@pytest.mark.parametrize("name", ["x", "", "Faithful"])
def test_a_name_that_the_model_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^preset: '{name}' is none of balanced, faithful, adventurous$"):
        ModelDecoding(OWN, PRESETS).preset(name)
    with pytest.raises(UserError, match=rf"^preset: this model has no presets, got '{name}'; leave it out$"):
        ModelDecoding(OWN).preset(name)


def test_decoding_and_presets_are_read_from_two_files(tmp_path: Path) -> None:
    decoding, presets = tmp_path / "decoding.json", tmp_path / "presets.json"
    write_json(decoding, OWN.to_mapping())
    write_json(presets, {name: preset.to_mapping() for name, preset in PRESETS.items()})
    found = read_decoding(decoding, presets)
    assert found == ModelDecoding(OWN, PRESETS)
    assert list(found.presets) == list(PRESETS)
    write_json(presets, {})
    assert read_decoding(decoding, presets) == read_decoding(decoding, None) == ModelDecoding(OWN)


@pytest.mark.parametrize(
    ("decoding", "presets", "message"),
    [
        ('{"top_p": 2}', "{}", r"decoding\.json: decoding\.top_p: 2 is out of range, must be in \(0, 1\]"),
        ("[1]", "{}", r"decoding\.json: decoding: expected names and values, got \[1\]"),
        ("{", "{}", r"decoding\.json: not JSON \(.*\)"),
        ("{}", "[]", r"presets\.json: expected names and their decoding parameters, got \[\]"),
        ("{}", '{"faithful": {"top_p": 2}}', r"presets\.json: faithful\.top_p: 2 is out of range, must be in \(0, 1\]"),
        ("{}", '{"faithful": 5}', r"presets\.json: faithful: expected names and values, got 5"),
        ("{}", "", r"presets\.json: not JSON \(.*\)"),
    ],
)
def test_a_file_that_is_wrong_is_named(decoding: str, presets: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "decoding.json").write_text(decoding)
    (tmp_path / "presets.json").write_text(presets)
    with pytest.raises(UserError, match=rf"^{tmp_path}/{message}$"):
        read_decoding(tmp_path / "decoding.json", tmp_path / "presets.json")


def test_values_that_are_given_take_the_place_of_defaults() -> None:
    defaults = SamplingParams(temperature=0.8, top_k=50, stop=("\n",), logit_bias={3: 1.0})
    merged = merge_decoding(defaults, {"temperature": 0.0, "top_k": 0, "seed": 7, "ignore_eos": False})
    assert merged == SamplingParams(temperature=0.0, stop=("\n",), logit_bias={3: 1.0}, seed=7)


def test_null_and_an_empty_list_mean_the_default() -> None:
    defaults = SamplingParams(temperature=0.8, stop=("\n",))
    assert merge_decoding(defaults, {"temperature": None, "stop": [], "max_new_tokens": None}) == defaults


def test_a_given_value_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"^top_p: 1\.5 is out of range, must be in \(0, 1\]$"):
        merge_decoding(SamplingParams(), {"top_p": 1.5})
