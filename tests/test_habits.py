"""The hooks, the CI workflow and the Makefile call the same checks."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from pipeline.params.section import read_yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def hooks() -> dict[str, dict[str, Any]]:
    (repository,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    return {hook["id"]: hook for hook in repository["hooks"]}


def test_hooks_run_the_tools_of_make_check() -> None:
    assert {hook["language"] for hook in hooks().values()} == {"system"}
    entries = [hook["entry"].split()[0] for hook in hooks().values()]
    assert entries[:3] == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]


def test_the_hook_for_large_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(1_000_000))
    (tmp_path / "a large one").write_bytes(bytes(1_000_001))
    command = shlex.split(hooks()["large-files"]["entry"])
    done = [
        subprocess.run([*command, *names], cwd=tmp_path, capture_output=True, text=True, check=False)
        for names in (["small"], ["a large one", "small"])
    ]
    assert [each.returncode for each in done] == [0, 1]
    assert done[1].stdout == "a large one is larger than 1 MB; track it with dvc add\n"


def test_no_file_in_git_is_larger_than_the_hook_allows() -> None:
    exclude = re.compile(hooks()["large-files"]["exclude"])
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in tracked.split("\0") if name and not exclude.search(name)]
    assert [name for name in names if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 1_000_000] == []


def test_git_changes_no_ends_of_lines_whatever_its_settings(tmp_path: Path) -> None:
    # autocrlf, which Git for Windows sets, would change files that DVC has hashed.
    git = ["git", "-c", "core.autocrlf=true", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    (tmp_path / "storage").write_bytes(b"unix\nlines\n")
    subprocess.run([*git, "add", "storage"], check=True)
    (tmp_path / "storage").unlink()
    subprocess.run([*git, "checkout", "--quiet", "storage"], check=True)
    assert (tmp_path / "storage").read_bytes() == b"unix\nlines\n"


def test_the_workflow_runs_what_developers_run() -> None:
    (job,) = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_a_download_without_git_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(MAKEFILE, encoding="utf-8")
    for name in ("pyproject.toml", "constraints.txt", ".venv/installed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    done = subprocess.run(["make", "data"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: this folder is not a git repository, which DVC needs; clone it, or run git init here" in done.stderr


def test_make_lists_its_targets() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    listed = set(re.findall(r"^\t@echo 'make ([a-z-]+) ", MAKEFILE, re.MULTILINE))
    assert listed == set(phony.split()) - {"help"}
