"""The base class and the common types of all sections of `params.yaml`."""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from pipeline.errors import UserError

PARAMS_FILE = Path("params.yaml")


def _check_regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Pattern = Annotated[str, AfterValidator(_check_regular_expression)]


class Section(BaseModel):
    """A section of the file: immutable, no unknown keys, no type conversion except from a whole number to a float."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
    )


AnySection = TypeVar("AnySection", bound=Section)


def read_yaml(path: Path) -> Any:
    """Read a YAML file as `parse_yaml` does. Raises `UserError` if it is not YAML in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> Any:
    """Parse YAML 1.2, as DVC writes it: `3e-05` is a number. Raises `UserError`, naming `path`, if it is not YAML."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem}") from error
    except ReaderError as error:
        raise UserError(f"{path}: not YAML: {error.reason}, character {error.position + 1}") from error


def validate(section: type[AnySection], values: Any, name: str) -> AnySection:
    """Check parsed YAML. Raises a one-line `UserError` that begins with `name` and names each wrong key."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(detail) for detail in error.errors(include_url=False))
        raise UserError(f"{name}: {problems}") from None


def _describe(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"]) or "the file"
    match detail["type"]:
        case "extra_forbidden":
            return f"{key}: no such parameter"
        case "missing":
            return f"{key}: is missing"
        case "value_error":
            return f"{key}: {detail['ctx']['error']}"
        case "model_type":
            return f"{key}: must be names and values, got {detail['input']!r}"
        case _:
            message = re.sub(r"^(Input|String|List) should", "must", detail["msg"])
            return f"{key}: {message}, got {detail['input']!r}"
