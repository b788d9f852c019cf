"""Facts about the machine, its libraries and the git checkout."""

import platform
from pathlib import Path

import pytest

from pipeline import machine


def test_only_installed_libraries_have_versions() -> None:
    assert set(machine.versions(("numpy", "no-such-distribution"))) == {"numpy"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: Fast CPU\nflags\t: fma\n\nmodel name\t: Other\n", "Fast CPU"),
        # ARM's kernels do not name the model.
        ("processor\t: 0\nFeatures\t: asimd\n", platform.processor() or platform.machine()),
    ],
)
def test_the_processor_is_named(text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPU_FILE", tmp_path / "cpuinfo")
    assert machine.processor_name() == name


def test_a_folder_outside_git_has_no_checkout(tmp_path: Path) -> None:
    assert machine.read_checkout(tmp_path) is None


def test_a_description_names_no_path() -> None:
    shown = machine.describe(("pytest",))
    assert {"processor", "cores", "memory", "system", "libraries", "commit"} <= set(shown)
    assert "pytest " in shown["libraries"]
    assert str(Path(machine.__file__).parents[1]) not in "".join(shown.values())
