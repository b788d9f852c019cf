"""The stage `base` for tests: its parameters for a small model, a training split, and the stage run in a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

from changed_params import write_changed_params

import pipeline
from pipeline.files import sha256_file, write_jsonl
from pipeline.params.base import BaseParams, ScratchParams

ROOT = Path(pipeline.__file__).parents[1]
SCRATCH = ScratchParams(vocabulary_size=300, context_length=64, layers=2, heads=2, width=32, seed=7)
TEXTS = ["The harbour sleeps, and the harbour lamps burn low.", "A lamp burns on the gull rock; the gulls sleep."] * 4
REPOSITORY = "harbour/tiny-gpt2"
REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


def write_training_split(folder: Path) -> Path:
    file = folder / "train.jsonl"
    write_jsonl(file, [{"id": str(index), "text": text} for index, text in enumerate(TEXTS)])
    return file


def params(
    source: str, revision: str | None = None, *, split_special_tokens: bool = False, **scratch: int
) -> BaseParams:
    return BaseParams(
        source=source,
        revision=revision,
        split_special_tokens=split_special_tokens,
        scratch=SCRATCH.model_copy(update=scratch),
    )


def hub_environment(**values: str) -> dict[str, str]:
    """Return the environment of this process without its settings for the hub, plus `values`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | {"PYTHONPATH": str(ROOT)} | values


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(folder.iterdir())}


STAGE_ON_EACH = """
import contextlib, io, json, shutil, sys
from pipeline.stages.base import main

messages = {}
for name in json.loads(sys.argv[1]):
    shutil.copy(f"{name}.yaml", "params.yaml")
    sys.argv[1:] = ["train.jsonl", name]
    with contextlib.redirect_stderr(io.StringIO()) as heard:
        try:
            main()
        except SystemExit as ended:
            print(name, "ended with code", ended.code)
    messages[name] = heard.getvalue()
print(json.dumps(messages))
"""
"""`huggingface_hub` reads its environment when imported: each environment needs its own process, which takes
seconds."""


def run_stage_on_each(folder: Path, sources: dict[str, tuple[str, str | None]], **values: str) -> dict[str, str]:
    """Run the stage on each source and revision, with its name as output folder; return what each wrote to stderr.

    A source that failed must have ended with exit code 2 and left nothing.
    """
    for name, (source, revision) in sources.items():
        write_changed_params(folder / f"{name}.yaml", {"base": params(source, revision).model_dump()})
    ended = subprocess.run(
        [sys.executable, "-c", STAGE_ON_EACH, json.dumps(list(sources))],
        cwd=folder,
        env=hub_environment(HF_HOME=str(folder / "hub-cache"), HF_TOKEN=TOKEN, **values),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert TOKEN not in ended.stdout + ended.stderr
    for name in sources:
        assert (f"{name} ended with code 2" in ended.stdout) is not (folder / name).exists()
    messages: dict[str, str] = json.loads(ended.stdout.splitlines()[-1])
    return messages
