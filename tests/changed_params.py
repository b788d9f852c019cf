"""Parameter files for tests: the committed `params.yaml` with other values."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.params.section import PARAMS_FILE, read_yaml

ROOT = Path(__file__).parents[1]


def write_changed_params(path: Path, changes: dict[str, Any], source: Path = ROOT / PARAMS_FILE) -> None:
    """Write the parameters of `source` with these values in place of its own; nested sections are merged."""
    values = read_yaml(source)
    merge(values, changes)
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(values, file)


def merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put the changes in their places among nested values."""
    for key, change in changes.items():
        if isinstance(change, dict):
            merge(values[key], change)
        else:
            values[key] = change
