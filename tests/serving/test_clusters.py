"""The examples of docs/scale.md, run as they are written there."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pytest
from isolated_store import STORE, isolated_store
from saved_model import save

import pipeline
from pipeline.files import read_jsonl, write_jsonl
from pipeline.tracking import store

SECTIONS = (Path(pipeline.__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8").split("\n### ")
PROMPTS = ["The lamp", "", "The lamp", "They say the tide"]
NAME = "harbour-tales"
without_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (the extra ray)")
without_spark = pytest.mark.skipif(find_spec("pyspark") is None, reason="pyspark is not installed (the extra spark)")
without_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed, which Spark needs")


@pytest.fixture
def champion(tiny_engine_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with prompts, and a store whose champion is the tiny model."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    with isolated_store(tmp_path):
        client = store.connect()
        version = mlflow.register_model(str(save(tmp_path, tiny_engine_folder)), NAME)
        client.set_registered_model_alias(NAME, "champion", version.version)
        yield tmp_path


def run_example(section: str, folder: Path) -> list[dict[str, str]]:
    """Run the code of a section, and return the rows that it writes."""
    (text,) = (part for part in SECTIONS if part.startswith(section))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("/path/to/this/repository/mlflow.db", str(folder / STORE))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYSPARK_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [row for file in sorted((folder / "texts").glob("*.json")) for row in read_jsonl(file)]


def check(rows: list[dict[str, str]]) -> None:
    assert sorted(row["prompt"] for row in rows) == sorted(PROMPTS)
    first, second = (row["text"] for row in rows if row["prompt"] == "The lamp")
    assert first
    assert first != second


@pytest.mark.slow
@without_ray
def test_ray_runs_the_registered_model(champion: Path) -> None:
    check(run_example("With Ray Data", champion))


@pytest.mark.slow
@without_spark
@without_java
def test_spark_runs_the_registered_model(champion: Path) -> None:
    check(run_example("With Spark", champion))
