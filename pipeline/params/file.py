"""Loading one section of `params.yaml`, for a stage."""

import importlib
from pathlib import Path

from pipeline.params.section import PARAMS_FILE, AnySection, read_yaml, validate


def load_section(name: str, section: type[AnySection], path: Path = PARAMS_FILE) -> AnySection:
    """Read one section, and check all others too. Raises `UserError` naming each wrong key."""
    values = read_yaml(path)
    # A typo in a later stage's section must not surface after hours of training. The check is imported by name, because
    # it cannot change what a stage writes: an import statement would make every section a dependency of every stage.
    importlib.import_module("pipeline.params.whole").parse_params(values, str(path))
    return validate(section, values[name], f"{path}: {name}")
