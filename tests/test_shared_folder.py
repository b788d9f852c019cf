"""A shared folder is made once, whoever needs it first; a build that fails fails for all; nobody writes to it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
import shared_folder as module
from shared_folder import check_unchanged, shared_folder


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_root", tmp_path)
    monkeypatch.setattr(module, "_used", set())


def write(folder: Path) -> None:
    (folder / "file").write_text("whole")


def test_all_wait_for_the_one_that_makes_it() -> None:
    builds: list[Path] = []

    def build(folder: Path) -> None:
        builds.append(folder)
        sleep(0.05)
        write(folder)

    def read(_: int) -> str:
        return (shared_folder("example", build) / "file").read_text()

    # A lock of a file keeps out other threads as it does other processes.
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(4))) == ["whole"] * 4
    assert len(builds) == 1


def test_a_failed_build_fails_for_all_and_is_not_tried_again() -> None:
    def build(folder: Path) -> None:
        write(folder)
        raise SystemExit("no space left")

    with pytest.raises(SystemExit, match="no space left"):
        shared_folder("example", build)
    with pytest.raises(pytest.fail.Exception, match=r"folder example could not be made:\n(.*\n)*SystemExit: no space"):
        shared_folder("example", write)


def test_a_folder_left_unfinished_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "example").mkdir()
    (tmp_path / "example" / "half").touch()
    assert [file.name for file in shared_folder("example", write).iterdir()] == ["file"]


def test_a_test_that_writes_there_is_noticed() -> None:
    folder = shared_folder("example", write)
    check_unchanged()
    (folder / "more").touch()
    with pytest.raises(pytest.fail.Exception, match="tests wrote to what they share: example; let them copy it"):
        check_unchanged()
