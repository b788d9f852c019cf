"""Take the bundled tales through all stages, and continue a text with the result, in a folder with a store of its own.

On CUDA, the engine's precisions begin with those for CUDA, and it is an error if `evaluate` or `generate` does not run
there. Nothing in the checkout changes, except that `data/` and `base/` are checked out if they are missing. The stages
run in the order of dvc.yaml, without DVC, and read the code as it is, committed or not.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.engine.manifest import CUDA_PRECISIONS
from pipeline.errors import UserError, report_errors
from pipeline.files import read_json
from pipeline.params.section import PARAMS_FILE, read_yaml

ROOT = Path(__file__).parents[1]
STAGES = {name: stage["cmd"] for name, stage in read_yaml(ROOT / "dvc.yaml")["stages"].items()}
TRACKED = ("data", "base")
PROMPT = "# The Lamp on Gull Rock"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to work; the next call replaces what is there")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--until", choices=STAGES, help="end after this stage")
    arguments = parser.parse_args()
    with report_errors():
        folder = arguments.folder.resolve()
        make_project(folder, arguments.provider)
        for name, command in STAGES.items():
            run(shlex.split(command)[1:], folder)
            if name == arguments.until:
                return
        check_and_generate(folder, arguments.provider)


def make_project(folder: Path, provider: str) -> None:
    """Copy parameters, text and base to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = read_yaml(ROOT / PARAMS_FILE)
    if provider == "cuda":
        precisions = values["export"]["precisions"]
        values["export"]["precisions"] = list(dict.fromkeys([*CUDA_PRECISIONS, *precisions]))
    with (folder / PARAMS_FILE).open("w", encoding="utf-8") as file:
        YAML().dump(values, file)
    for name in TRACKED:
        if not (ROOT / name).exists():
            run(["-m", "dvc", "pull", "--quiet", "--remote", "embedded", f"{name}.dvc"], ROOT)
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)


def check_and_generate(folder: Path, provider: str) -> None:
    """Print where the model was evaluated and its score, and continue a text with the engine and the registered model.

    Raises `UserError` if it was evaluated elsewhere than asked for.
    """
    details = read_json(folder / "out" / "evaluate" / "details.json")
    protocol, score = details["protocol"], details["documents"]["finetuned"]["bits_per_byte"]
    print(f"evaluated on {protocol['provider']} in {protocol['precision']}: {score:.4f} bits per byte", flush=True)
    if protocol["provider"] != provider:
        raise UserError(f"evaluate: ran on {protocol['provider']}, not on {provider}; doctor says what is missing")
    generate = ["-m", "pipeline", "generate", PROMPT, "--provider", provider, "--max-new-tokens", "60", "--seed", "7"]
    name = read_yaml(folder / PARAMS_FILE)["register"]["name"]
    for precision in CUDA_PRECISIONS if provider == "cuda" else ("auto",):
        run([*generate, "--precision", precision], folder)
    run([*generate, "--model", f"models:/{name}@champion"], folder)


def run(arguments: Sequence[str], folder: Path) -> None:
    """Run Python in a folder, with this code and the folder's store. Raises `UserError` if it does not end well."""
    print(f"$ python {shlex.join(arguments)}", flush=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_"))}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = kept | {"PYTHONPATH": paths, "DVC_ROOT": str(folder)}
    code = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=False).returncode
    if code:
        raise UserError(f"{shlex.join(arguments[:2])}: ended with exit code {code}")


if __name__ == "__main__":
    main()
