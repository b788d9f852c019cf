"""What a module imports from this package, by its source: a stage's dependencies, and the code of a model."""

import ast
from pathlib import Path

PACKAGE = "pipeline"


def needed_files(module: str, root: Path) -> set[Path]:
    """Return the files under `root` that importing `module` (`pipeline.stages.prepare`) reads, packages included.

    Imports inside functions count too, and so does a file in a module's folder if a string in the module is its name.
    Raises `ModuleNotFoundError` if a module of the package does not exist.
    """
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _file_of(name, root)
        if file is None:
            raise ModuleNotFoundError(f"no module {name} under {root}")
        if file in found:
            continue
        found.add(file)
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        found |= _files_named_in(tree, file)
        waiting += _imported(tree, root)
    return found


def rename_package(source: bytes, name: str) -> bytes:
    """Return a module's source, which imports from the package `name` what it imported from this one.

    Every line keeps its place. `import pipeline` is left as it is: the name that it binds may be used anywhere.
    """
    lines = source.splitlines(keepends=True)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    # From the last: a replacement moves what follows in its line.
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        if node.level == 0 and (node.module or "").split(".")[0] == PACKAGE:
            line, start = lines[node.lineno - 1], node.col_offset
            lines[node.lineno - 1] = line[:start] + line[start:].replace(PACKAGE.encode(), name.encode(), 1)
    return b"".join(lines)


def _files_named_in(tree: ast.Module, file: Path) -> set[Path]:
    """Return the files in a module's folder, other than modules, that a string in the module names."""
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    beside = (other for other in file.parent.iterdir() if other.is_file() and other.suffix != ".py")
    return {other for other in beside if other.name in texts}


def _imported(tree: ast.Module, root: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from pipeline import tracking` names a module, `from pipeline.errors import UserError` does not.
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [node.module, *(part for part in parts if _file_of(part, root))]
    return [name for name in names if name.split(".")[0] == PACKAGE]


def _file_of(module: str, root: Path) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
