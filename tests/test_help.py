"""The help of every command ends with examples, and the examples parse."""

import re
import shlex

import pytest

from pipeline.__main__ import build_parser

PROGRAM = "python -m pipeline "


def shown_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def examples_in(shown: str) -> list[str]:
    return [line.strip() for line in shown.partition("\nexample:\n")[2].splitlines()]


def test_the_help_of_every_command_ends_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    overview = shown_by(capsys)
    commands = re.findall(r"^ {4}([a-z][a-z-]+)(?: |$)", overview, re.MULTILINE)
    assert {"generate", "serve", "advise"} <= set(commands)
    for command in commands:
        own = [line for line in examples_in(shown_by(capsys, command)) if line.startswith(PROGRAM)]
        assert own, command
        for line in own:
            parsed = shlex.split(line.removeprefix(PROGRAM))
            assert parsed[0] == command
            assert callable(build_parser().parse_args(parsed).run)


def test_the_overview_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = examples_in(shown_by(capsys))
    assert callable(build_parser().parse_args(shlex.split(example.removeprefix(PROGRAM))).run)
