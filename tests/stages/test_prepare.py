"""The command of the stage `prepare`."""

import json
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


def test_stage_imports_neither_torch_nor_transformers_nor_mlflow() -> None:
    code = "import sys, pipeline.stages.prepare; print({'torch', 'transformers', 'mlflow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
