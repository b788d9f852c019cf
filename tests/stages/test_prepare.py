"""The command of the stage `prepare`."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from untidy_tales import END, START, tale, write_tales

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.stages.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_command_sums_up_in_one_line(tmp_path: Path) -> None:
    write_tales(tmp_path / "data")
    with (tmp_path / "data" / "more.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": tale(f"More{number}")}) + "\n" for number in range(60))
    result = run(str(tmp_path / "data"), str(tmp_path / "out" / "prepare"))
    assert result.returncode == 0
    assert result.stdout.startswith("prepare: kept 80 of 85 rows from 5 files; dropped 1 empty, 1 fragment, 2 exact ")
    notices = f"Do not remove.\n{START}\n{END}\nBelow.\n"
    removed = f"{len(notices)} characters of notices, 60 characters of markup (2.jsonl 60)"
    assert f" 1 near duplicate, {removed}; " in result.stdout
    assert result.stderr == ""


def test_command_reports_bad_input_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}\nbroken\n')
    result = run(str(tmp_path / "data"), str(tmp_path / "out"))
    assert result.returncode == 2
    error = f"{tmp_path}/data/a.jsonl:2: not JSON (Expecting value at column 1); repair the line; a line is a row"
    assert result.stderr == f"error: {error}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.lock"]


def write_rows(data: Path, count: int) -> None:
    data.mkdir()
    with (data / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": tale(f"Row{number}") * 3}) + "\n" for number in range(count))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", 400)
    with (tmp_path / "data" / "rows.jsonl").open() as file:
        written = file.seek(0, 2)
    for blocks in (1, written // 2 // 1024, written // 1024):  # the limit is reached by one file after the other
        command = f"ulimit -f {blocks}; exec {sys.executable} -m pipeline.stages.prepare {tmp_path}/data {tmp_path}/out"
        result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert result.stderr.startswith(f"error: {tmp_path}/out.")
        assert result.stderr.endswith(": File too large\n")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.lock"]


def test_temporary_files_are_where_a_parameter_says_and_are_removed_after_a_kill(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", 30)
    scratch = tmp_path / "scratch"
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from pipeline.corpus import preparation\n"
        "from pipeline.params.whole import load_params\n"
        "params = load_params(Path('params.yaml')).prepare.model_copy(update={'temporary_folder': SCRATCH})\n"
        "if KILLED:\n"
        "    preparation.Deduplicator.relate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "preparation.prepare(Path(DATA), Path(OUT), params)\n"
    )
    for killed, left in ((True, 1), (False, 0)):
        values = (
            f"SCRATCH, DATA, OUT, KILLED = {str(scratch)!r}, {f'{tmp_path}/data'!r}, {f'{tmp_path}/out'!r}, {killed}\n"
        )
        result = subprocess.run([sys.executable, "-c", values + code], cwd=ROOT, check=False)
        assert result.returncode == (-signal.SIGKILL if killed else 0)
        assert len(list(scratch.iterdir())) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out", "scratch"]


def test_stage_imports_neither_torch_nor_transformers_nor_mlflow() -> None:
    code = "import sys, pipeline.stages.prepare; print({'torch', 'transformers', 'mlflow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
