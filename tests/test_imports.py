"""The files that a module needs, found in its source."""

from pathlib import Path

import pytest

from pipeline.imports import needed_files, rename_package

FILES = {
    "pipeline/__init__.py": "",
    "pipeline/errors.py": "import sys",
    "pipeline/files.py": "import json\nfrom pathlib import Path",
    "pipeline/tracking.py": "import pipeline.errors",
    "pipeline/unused.py": "",
    "pipeline/stages/__init__.py": "",
    "pipeline/stages/prepare.py": "from pipeline import tracking, VERSION",
    "pipeline/stages/late.py": "def main():\n    from pipeline.files import read_json",
    "pipeline/stages/circular.py": "from pipeline.stages import circular",
    "pipeline/stages/broken.py": "from pipeline.missing import nothing",
    "pipeline/engine/__init__.py": "from pipeline.engine.session import Session",
    "pipeline/engine/session.py": "class Session: ...",
    "pipeline/engine/draw.cu": "",
    "pipeline/engine/unused.cu": "",
    "pipeline/engine/kernel.py": "from pathlib import Path\nSOURCE = Path(__file__).with_name('draw.cu')",
    "pipeline/stages/drawing.py": "from pipeline.engine.kernel import SOURCE",
    "pipeline/engine/sampling.py": "",
    "pipeline/stages/export.py": "from pipeline.engine.sampling import sample",
    "pipeline/stages/outside.py": "import numpy, pipelines.errors\nfrom pipelines import errors",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, source in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path


def needed(module: str, root: Path) -> set[str]:
    """Return what `module` needs besides itself and its packages."""
    own = {"pipeline/__init__.py", "pipeline/stages/__init__.py", f"{module.replace('.', '/')}.py"}
    found = {file.relative_to(root).as_posix() for file in needed_files(module, root)}
    assert own <= found
    return found - own


def test_imports_are_followed_through_modules(root: Path) -> None:
    assert needed("pipeline.stages.prepare", root) == {"pipeline/tracking.py", "pipeline/errors.py"}


def test_an_import_inside_a_function_counts(root: Path) -> None:
    assert needed("pipeline.stages.late", root) == {"pipeline/files.py"}


def test_a_module_brings_its_package_and_what_that_imports(root: Path) -> None:
    assert needed("pipeline.stages.export", root) == {
        "pipeline/engine/__init__.py",
        "pipeline/engine/session.py",
        "pipeline/engine/sampling.py",
    }


def test_a_file_beside_a_module_that_names_it_counts(root: Path) -> None:
    assert needed("pipeline.stages.drawing", root) == {
        "pipeline/engine/__init__.py",
        "pipeline/engine/session.py",
        "pipeline/engine/kernel.py",
        "pipeline/engine/draw.cu",
    }


def test_a_circle_ends(root: Path) -> None:
    assert needed("pipeline.stages.circular", root) == set()


def test_other_packages_do_not_count(root: Path) -> None:
    assert needed("pipeline.stages.outside", root) == set()


def test_a_module_that_is_not_there_is_an_error(root: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"no module pipeline\.missing under "):
        needed_files("pipeline.stages.broken", root)


def test_a_renamed_package_imports_itself() -> None:
    source = """\
'from pipeline.errors import a text'
from pipeline import errors, \\
    files
import pipeline
from pipelines import pipeline
from .pipeline import near

def late():
    'é'; from pipeline.pipeline import pipeline; from pipeline.files import (  # from pipeline
        read_json,
    )
    return "from pipeline import errors"
"""
    expected = source.replace("\nfrom pipeline import", "\nfrom other import")
    expected = expected.replace("from pipeline.pipeline", "from other.pipeline").replace(
        "from pipeline.files", "from other.files"
    )
    assert rename_package(source.encode(), "other").decode() == expected
    windows = b"from pipeline.files import read_json\r\n\r\n# from pipeline\r\n"
    assert rename_package(windows, "other") == windows.replace(b"from pipeline.files", b"from other.files")
