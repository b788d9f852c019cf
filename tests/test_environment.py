"""docs/environment.md lists every environment variable that the project reads or sets, and no other."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import pipeline
from pipeline.params.section import read_yaml

ROOT = Path(pipeline.__file__).parents[1]
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
PYTHON_FILES = sorted(file for folder in ("pipeline", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
COMPOSE_FILES = sorted((ROOT / "deploy").glob("compose*.yaml"))
NAME = re.compile(r"(?:[A-Z][A-Z0-9]*_[A-Z0-9_]*[A-Z0-9]|PYTHON[A-Z]*|PATH|TMPDIR)")
MENTION = re.compile(r"\b(?:CUBLAS|CUDA|DVC|FSDP|HF|MLFLOW|NCCL|OMP|ORT|PIPELINE)_[A-Z0-9_]+\b")
READ_BY_LIBRARIES = {"HF_HOME", "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_TRACES_SAMPLER"}
READ_BY_LIBRARIES |= {"AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY"}


def names_in_python(source: str) -> set[str]:
    """The variables that a module names in its strings.

    Beside `os.environ` or `os.getenv`, a string that looks like a variable's name counts as one; elsewhere, only names
    that begin like those of a library that this project uses.
    """
    tree = ast.parse(source)
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    mentioned = {name for text in strings for name in MENTION.findall(text)}
    touches_environment = any(
        isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv") for node in ast.walk(tree)
    )
    return mentioned | ({text for text in strings if NAME.fullmatch(text)} if touches_environment else set())


def names_in_dockerfile(text: str) -> set[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return {name for line in lines if line.startswith("ENV ") for name in re.findall(r"(\w+)=", line)}


def names_in_compose(file: Path) -> set[str]:
    services = read_yaml(file)["services"].values()
    set_there = {name for service in services for name in service.get("environment", {})}
    return set_there | set(re.findall(r"\$\{(\w+)", file.read_text(encoding="utf-8")))


def names_in_makefile(text: str) -> set[str]:
    patterns = (r"^export ([A-Z_]+) ", r"^\t@?([A-Z_]+)=", r"^([A-Z_]+) \?=")
    return {name for pattern in patterns for name in re.findall(pattern, text, re.MULTILINE)}


def names_in_example(text: str) -> set[str]:
    return set(re.findall(r"^(\w+)=", text, re.MULTILINE))


@cache
def names_of(file: Path) -> set[str]:
    """The variables that a file of the project reads or sets."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return names_in_python(text)
    if file.suffix == ".yaml":
        return names_in_compose(file)
    return {"Dockerfile": names_in_dockerfile, "Makefile": names_in_makefile, "example.env": names_in_example}[
        file.name
    ](text)


FILES = [
    *PYTHON_FILES,
    *COMPOSE_FILES,
    ROOT / "Makefile",
    ROOT / "deploy" / "Dockerfile",
    ROOT / "deploy" / "example.env",
]


def documented() -> set[str]:
    """The variables of the page's tables, and of the sentence about make."""
    return set(re.findall(r"^\| `([A-Z0-9_]+)` \|", PAGE, re.MULTILINE)) | {"PYTHON"}


def test_every_variable_is_documented() -> None:
    missing = {file.relative_to(ROOT).as_posix(): names for file in FILES if (names := names_of(file) - documented())}
    assert not missing


def test_every_documented_variable_is_used() -> None:
    assert documented() - READ_BY_LIBRARIES == set().union(*map(names_of, FILES))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import os\nos.environ['NEW_NAME']", {"NEW_NAME"}),
        ("import os\nKEY = 'NEW_NAME'\nos.environ.get(KEY)", {"NEW_NAME"}),
        ("import os\nos.getenv('NEW_NAME', 'x')", {"NEW_NAME"}),
        ("import os\nenvironment = os.environ | {'PYTHONSTARTUP': ''}", {"PYTHONSTARTUP"}),
        ("'set HF_TOKEN for a private one'", {"HF_TOKEN"}),
        ("NEW_NAME = 'OTHER_NAME'", set()),
    ],
)
def test_names_are_found_in_python(source: str, names: set[str]) -> None:
    assert names_in_python(source) == names
