"""Imports point one way: from the commands down to the ground, without circles."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from dag import ROOT

TIERS = (
    {"errors", "files", "imports", "machine", "cores", "charts", "object_store", "progress", "stage_process"},
    {"decoding", "tokens", "curves", "checkpoint", "params"},
    {"engine", "quality", "corpus", "tracking", "base"},
    {"export", "evaluation", "training", "resume", "doctor", "many_prompts"},
    {"serving", "stages"},
    {"advice", "__main__"},
)
"""Modules and folders of `pipeline/`, lowest first. Each imports from its own tier and from lower ones."""
FILES = sorted(file for file in (ROOT / "pipeline").rglob("*.py") if "__pycache__" not in file.parts)


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imported(file: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [part for part in parts if part in MODULES] or [node.module]


def part_of(module: str) -> str:
    """Return the loose module or the folder that a module belongs to."""
    return module.split(".")[1] if "." in module else "pipeline"


IMPORTS = {module: set(imported(file)) for module, file in MODULES.items()}
LEVELS = {part: level for level, tier in enumerate(TIERS) for part in tier} | {"pipeline": 0}


def test_every_part_has_a_tier() -> None:
    assert {part_of(module) for module in MODULES} == set(LEVELS)


@pytest.mark.parametrize("module", MODULES)
def test_no_import_points_upwards(module: str) -> None:
    own = LEVELS[part_of(module)]
    assert [other for other in IMPORTS[module] if LEVELS[part_of(other)] > own] == []


def test_there_is_no_circle_of_modules() -> None:
    TopologicalSorter(IMPORTS).prepare()


def test_there_is_no_circle_of_parts() -> None:
    parts: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        own = part_of(module)
        parts.setdefault(own, set()).update(part_of(other) for other in others if part_of(other) != own)
    TopologicalSorter(parts).prepare()
