"""Fine-tunings as DVC experiments, for `python -m pipeline advise`; they run in folders of DVC's own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import UserError

STAGE_FILE = Path("dvc.yaml")


def check_place() -> None:
    """Raise `UserError` if DVC is missing, or this is not the folder of a project."""
    if not STAGE_FILE.is_file():
        raise UserError(f"{STAGE_FILE}: is not in this folder; go to the folder of the project")
    if shutil.which("dvc") is None:
        raise UserError("dvc is not on the PATH; activate the environment first: source .venv/bin/activate")


def run_experiment(name: str, stage: str, parameters: Mapping[str, object]) -> None:
    """Run a stage and the stages it needs, with these keys of `params.yaml` changed.

    DVC takes from its cache what has already run on the same inputs. But it refuses a name that is taken, even if
    nothing has changed. So an experiment of that name on the same commit is removed first; unless something did change,
    it is back within seconds. Raises `UserError` if the experiment fails.
    """
    if name in _dvc("exp", "list", "--name-only").splitlines():
        _dvc("exp", "remove", name)
    options = [part for key, value in parameters.items() for part in ("--set-param", f"{key}={value}")]
    _dvc("exp", "run", "--temp", "--name", name, *options, stage, is_shown=True)


def read_output(name: str, path: Path) -> str:
    """Return the text of an experiment's output. Raises `UserError` if DVC no longer has it."""
    import dvc.api
    from dvc.exceptions import DvcException

    try:
        return str(dvc.api.read(path.as_posix(), rev=name))
    except (DvcException, OSError) as error:
        raise UserError(f"experiment {name}: DVC does not hold its {path}: {error}; run it again") from error


def _dvc(*arguments: str, is_shown: bool = False) -> str:
    """Run a DVC command and return its output; with `is_shown`, also copy it to stderr as it arrives.

    Raises `UserError` with the line that says why if the command fails.
    """
    lines: list[str] = []
    command = ["dvc", *arguments]
    # Otherwise DVC's own lines come after those of its stages.
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
    """Return the line that says why a DVC command failed: its stage's error, or else DVC's last line."""
    written = [line.strip() for line in lines if line.strip()] or ["it does not say why"]
    for start in ("error: ", "ERROR: "):
        if errors := [line.removeprefix(start) for line in written if line.startswith(start)]:
            return errors[-1]
    return written[-1]
