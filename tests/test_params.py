"""params.yaml is read strictly, with errors that name each wrong key."""

import copy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import pipeline
from pipeline.decoding import SamplingParams
from pipeline.errors import UserError, report_errors
from pipeline.params.section import read_yaml
from pipeline.params.whole import load_params, parse_params

ROOT = Path(pipeline.__file__).parents[1]
COMMITTED = read_yaml(ROOT / "params.yaml")

WRONG = [
    # Unknown
    ("finetun", {}, "finetun: no such parameter"),
    ("finetune.learning_rates", 1, "finetune.learning_rates: no such parameter"),
    ("finetune.samples.top_k", 1, "finetune.samples.top_k: no such parameter"),
    ("base.scratch.dropout", 0.1, "base.scratch.dropout: no such parameter"),
    # Mistyped
    ("finetune.seed", "1", "finetune.seed: must be a valid integer, got '1'"),
    ("finetune.seed", 1.0, "finetune.seed: must be a valid integer, got 1.0"),
    ("finetune.epochs", "3", "finetune.epochs: must be a valid number, got '3'"),
    ("finetune.samples.prompts", "a", "finetune.samples.prompts: must be a valid list, got 'a'"),
    ("finetune.samples.prompts", ["a", 3], "finetune.samples.prompts.1: must be a valid string, got 3"),
    ("prepare.text_column", None, "prepare.text_column: must be a valid string, got None"),
    ("export", None, "export: must be names and values, got None"),
    # A boolean is not a number, and a number is not a boolean
    ("finetune.epochs", True, "finetune.epochs: must be a valid number, got True"),
    ("finetune.seed", False, "finetune.seed: must be a valid integer, got False"),
    ("finetune.context_length", True, "finetune.context_length: must be a valid integer, got True"),
    ("prepare.straighten_quotes", 1, "prepare.straighten_quotes: must be a valid boolean, got 1"),
    ("evaluate.decoding.top_k", True, "evaluate.decoding: top_k: expected a whole number, got True"),
    # Out of range
    (
        "base.scratch.vocabulary_size",
        256,
        "base.scratch.vocabulary_size: must be greater than or equal to 257, got 256",
    ),
    ("base.scratch.width", 1, "base.scratch: width 1 is not a multiple of heads "),
    ("base.source", "", "base.source: must have at least 1 character, got ''"),
    ("prepare.near_duplicate.jaccard", 0, "prepare.near_duplicate.jaccard: must be greater than 0, got 0"),
    ("prepare.test_share", 1.0, "prepare.test_share: must be less than 1, got 1.0"),
    ("prepare.test_share", 0.9, "prepare: validation_share and test_share leave nothing to train on"),
    ("finetune.learning_rate", 0, "finetune.learning_rate: must be greater than 0, got 0"),
    ("finetune.learning_rate", float("nan"), "finetune.learning_rate: must be a finite number, got nan"),
    ("finetune.epochs", float("inf"), "finetune.epochs: must be a finite number, got inf"),
    ("finetune.dropout", 1, "finetune.dropout: must be less than 1, got 1"),
    ("finetune.seed", 2**32, f"finetune.seed: must be less than {2**32}, got {2**32}"),
    ("export.parity.positions", 999, "export.parity.positions: must be greater than or equal to 1000, got 999"),
    ("register.name", "a/b", "register.name: must match pattern"),
    (
        "tune.space.temperature",
        {"low": 1.2, "high": 0.6, "step": 0.05},
        "tune.space.temperature: low 1.2 is above high 0.6",
    ),
    (
        "tune.space.temperature",
        {"low": 0.6, "high": 1.12, "step": 0.05},
        "tune.space.temperature: steps of 0.05 from low 0.6 miss high 1.12; set high to 1.1 or 1.15, or change step",
    ),
    (
        "tune.space.min_p",
        {"low": 0.0, "high": 0.05, "step": 0.1},
        "tune.space.min_p: steps of 0.1 from low 0 miss high 0.05; set high to 0 or 0.1, or change step",
    ),
    (
        "tune.space.top_p",
        {"low": 0.0, "high": 1.0, "step": 0.1},
        "tune.space: top_p: 0.0 is out of range, must be in (0, 1]",
    ),
    ("tune.space.top_k", [0, -1], "tune.space: top_k: -1 is out of range, must be at least 0"),
    ("tune.space.top_n_sigma", [], "tune.space.top_n_sigma: must have at least 1 item"),
    ("tune.space.min_p.step", 0, "tune.space.min_p.step: must be greater than 0, got 0"),
    ("tune.samples", 1, "tune.samples: must be greater than or equal to 2, got 1"),
    # Patterns
    ("prepare.separator", "(", "prepare.separator: not a regular expression: missing ), unterminated subpattern"),
    ("samples.form_pattern", "*", "samples.form_pattern: not a regular expression: nothing to repeat"),
    # Decoding
    ("evaluate.decoding.top_p", 1.5, "evaluate.decoding: top_p: 1.5 is out of range, must be in (0, 1]"),
    ("evaluate.decoding.topp", 0.5, "evaluate.decoding: topp: no such decoding parameter; known are allowed_token_ids"),
    ("evaluate.decoding.seed", 1, "evaluate.decoding: seed: set evaluate.seed"),
    ("evaluate.decoding.n", 2, "evaluate.decoding: n: 2 is out of range, must be 1"),
    ("evaluate.decoding", 3, "evaluate.decoding: decoding parameters: expected names and values, got 3"),
]


def with_value(key: str, value: Any) -> Any:
    """Return the committed parameters with one changed."""
    values = copy.deepcopy(COMMITTED)
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    section[name] = value
    return values


def leaves(values: Any, prefix: str = "") -> list[str]:
    """Return every key that has a value, except those of `evaluate.decoding`, which are all optional."""
    if not isinstance(values, dict) or prefix == "evaluate.decoding.":
        return [prefix.removesuffix(".")]
    return [key for name, value in values.items() for key in leaves(value, f"{prefix}{name}.")]


def test_the_committed_file_is_right() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.base.source == COMMITTED["base"]["source"]
    assert params.register_.name == COMMITTED["register"]["name"]
    assert params.evaluate.decoding == SamplingParams(**COMMITTED["evaluate"]["decoding"])


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_wrong_value_gives_one_line_that_names_its_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_params(with_value(key, value), "params.yaml")
    assert str(caught.value).startswith(f"params.yaml: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", leaves(COMMITTED))
def test_every_key_is_required(key: str) -> None:
    values = copy.deepcopy(COMMITTED)
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    del section[name]
    with pytest.raises(UserError, match=rf"^params\.yaml: {key}: is missing$"):
        parse_params(values, "params.yaml")


def test_one_line_names_all_wrong_keys() -> None:
    values = with_value("finetune.seed", -1)
    values["prepare"]["separator"] = "("
    values["finetune"]["rate"] = 1
    del values["register"]
    with pytest.raises(UserError) as caught:
        parse_params(values, "params.yaml")
    message = str(caught.value)
    assert "\n" not in message
    for key in ("finetune.seed: ", "prepare.separator: ", "finetune.rate: no such", "register: is missing"):
        assert key in message


@pytest.mark.parametrize("written", ["3e-05", "3.0e-05", "0.00003"])
def test_a_number_with_an_exponent_is_a_number(written: str, tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    line = f"learning_rate: {COMMITTED['finetune']['learning_rate']}"
    assert line in text
    (tmp_path / "params.yaml").write_text(text.replace(line, f"learning_rate: {written}"), encoding="utf-8")
    assert load_params(tmp_path / "params.yaml").finetune.learning_rate == 3e-5


def test_what_dvc_writes_reads_back_the_same(tmp_path: Path) -> None:
    # `dvc exp run -S` writes the whole file with ruamel.
    values = with_value("finetune.learning_rate", 0.00003)
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(values, file)
    assert "learning_rate: 3e-05" in (tmp_path / "params.yaml").read_text(encoding="utf-8")
    assert read_yaml(tmp_path / "params.yaml") == values


def test_a_whole_number_serves_as_a_float() -> None:
    params = parse_params(with_value("finetune.epochs", 3), "params.yaml")
    assert params.finetune.epochs == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"base:\n  source: [scratch\n", ":3: not YAML: expected ',' or ']', but got '<stream end>'"),
        (b"a: 1\nb: 2\na: 3\n", ':3: not YAML: found duplicate key "a"'),
        (b"a: *b\n", ":1: not YAML: found undefined alias 'b'"),
        (b"a: \x00\n", ": not YAML: special characters are not allowed, character 4"),
        (b"a: \xff\n", ": not UTF-8 at byte 4; save it as UTF-8"),
        (b"", ": the file: must be names and values, got None"),
        (b"- 1\n", ": the file: must be names and values, got [1]"),
        (b"3\n", ": the file: must be names and values, got 3"),
    ],
)
def test_a_file_without_parameters_is_an_error_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_params(file)
    assert str(caught.value).startswith(f"{file}{message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, report_errors():
        load_params(tmp_path / "params.yaml")
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'params.yaml'}: No such file or directory\n"


def test_parameters_are_fixed_once_read() -> None:
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.finetune.seed = 2
