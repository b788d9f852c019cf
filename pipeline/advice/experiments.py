"""Fine-tunings as experiments of DVC, in folders of their own: the workspace and its outputs stay as they are."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import UserError

STAGE_FILE = Path("dvc.yaml")


def check_place() -> None:
    """Raise `UserError` where DVC would not run, or not this project."""
    if not STAGE_FILE.is_file():
        raise UserError(f"{STAGE_FILE}: there is none here; go to the folder of the project")
    if shutil.which("dvc") is None:
        raise UserError("dvc is not on the path; activate the environment first: source .venv/bin/activate")


def run_experiment(name: str, stage: str, parameters: Mapping[str, object]) -> None:
    """Run a stage, and before it what it needs, with these keys of `params.yaml` changed.

    What was run before on the same inputs DVC takes from its cache. It refuses a name that is taken, though, even where
    nothing has changed: an experiment of that name on the same commit is removed first, and is there again within
    seconds unless something did change. Raises `UserError` where it fails.
    """
    if name in _dvc("exp", "list", "--name-only").splitlines():
        _dvc("exp", "remove", name)
    options = [part for key, value in parameters.items() for part in ("--set-param", f"{key}={value}")]
    _dvc("exp", "run", "--temp", "--name", name, *options, stage, is_shown=True)


def read_output(name: str, path: Path) -> str:
    """The text of an output of an experiment. Raises `UserError` where DVC has it no longer."""
    import dvc.api
    from dvc.exceptions import DvcException

    try:
        return str(dvc.api.read(path.as_posix(), rev=name))
    except (DvcException, OSError) as error:
        raise UserError(f"experiment {name}: DVC does not hold its {path}: {error}; run it again") from error


def _dvc(*arguments: str, is_shown: bool = False) -> str:
    """What a command of DVC writes; where it is shown, then on stderr as it comes.

    Raises `UserError` with the line that says why where it fails.
    """
    lines: list[str] = []
    command = ["dvc", *arguments]
    # Else DVC's own lines come after those of its stages.
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        assert process.stdout is not None  # noqa: S101
        for line in process.stdout:
            lines.append(line)
            if is_shown:
                print(line, end="", file=sys.stderr, flush=True)
    if process.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {reason(lines)}")
    return "".join(lines)


def reason(lines: Iterable[str]) -> str:
    """The line that says why a command of DVC failed: that of its stage, or else DVC's last."""
    written = [line.strip() for line in lines if line.strip()] or ["it does not say why"]
    for start in ("error: ", "ERROR: "):
        if told := [line.removeprefix(start) for line in written if line.startswith(start)]:
            return told[-1]
    return written[-1]
