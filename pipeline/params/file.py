"""Read `params.yaml`: the section of a stage, with errors that name each wrong key."""

import importlib
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from pipeline.errors import UserError
from pipeline.params.section import Section

PARAMS_FILE = Path("params.yaml")

AnySection = TypeVar("AnySection", bound=Section)


def load_section(name: str, section: type[AnySection], path: Path = PARAMS_FILE) -> AnySection:
    """Read one section, and check all others too. Raises `UserError` naming each wrong key."""
    values = read_yaml(path)
    # A typo in a later stage's section must not surface after hours of training. The check is imported by name, because
    # it cannot change what a stage writes: an import statement would make every section a dependency of every stage.
    importlib.import_module("pipeline.params.whole").parse_params(values, str(path))
    return validate(section, values[name], f"{path}: {name}")


def read_yaml(path: Path) -> Any:
    """Read a YAML 1.2 file, as DVC writes it: `3e-05` is a number. Raises `UserError` if it is not YAML."""
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem}") from error
    except ReaderError as error:
        raise UserError(f"{path}: not YAML: {error.reason}, character {error.position + 1}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error


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
