"""Errors end a command with one line and an exit code."""

import errno
import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pipeline.errors import UserError, report_errors
from pipeline.files import whole_file, whole_folder


def test_a_user_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, report_errors():
        raise UserError("params.yaml: finetune.epochs: must be greater than 0, got -1")
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: params.yaml: finetune.epochs: must be greater than 0, got -1\n"
    assert captured.out == ""


def test_a_terminal_that_lacks_a_character_gets_its_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    with report_errors():
        print("Küste – Möwe")
    assert terminal.buffer.getvalue() == b"K\xfcste \\u2013 M\xf6we\n"  # type: ignore[attr-defined]


def test_an_operating_system_error_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, report_errors():
        (tmp_path / "missing").read_text()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'missing'}: No such file or directory\n"


def test_what_is_nobodys_input_passes_through() -> None:
    with pytest.raises(ValueError, match=r"^a bug$"), report_errors():
        raise ValueError("a bug")


def test_a_block_that_ends_well_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with report_errors():
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("whole", [whole_folder, whole_file])
def test_a_full_disk_is_named_by_what_was_to_be_written(
    whole: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), report_errors(), whole(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_other_errors_keep_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), report_errors(), whole_folder(tmp_path / "out"):
        raise ConnectionError("the tracking server does not answer")
    assert capsys.readouterr().err == "error: the tracking server does not answer\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
def test_a_write_that_the_system_refuses_leaves_nothing_and_is_reported_in_one_line(tmp_path: Path) -> None:
    code = (
        "import resource; from pathlib import Path\n"
        "from pipeline.errors import report_errors; from pipeline.files import whole_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "with report_errors(), whole_folder(Path('out')) as partial:\n"
        "    (partial / 'weights').write_bytes(bytes(20_000))"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (process.returncode, process.stderr) == (2, "error: out: File too large\n")
    assert list(tmp_path.iterdir()) == []
