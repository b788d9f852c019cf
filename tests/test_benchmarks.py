"""The benchmark runs from end to end on a tiny model; what it measures there means nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.checkpoint import load_checkpoint
from pipeline.engine.cuda import driver
from pipeline.engine.verbatim import index_text
from pipeline.export.build import build_engine
from pipeline.tokens import write_tokens

ROOT = Path(__file__).parents[1]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A benchmark as a process, from the repository's root."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory and processor time from /proc")
def test_decode_compares_the_engine_with_its_peers(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/decode.py", "--checkpoint", "tiny", "--rounds", "1", "--new-tokens", "4"]
    command += ["--contenders", "engine-float32,engine-int8,transformers-float32,optimum-float32"]
    command += [
        "--batch",
        "1,2",
        "--contexts",
        "8",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "result"),
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr
    result = (tmp_path / "result").read_text()
    assert result == done.stdout
    for name in ("engine-float32", "engine-int8", "transformers-float32", "optimum-float32"):
        assert name in result
    assert str(tmp_path) not in result


def test_finetune_compares_training_with_transformers_recipe(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    for split, count in (("train", 60), ("validation", 2)):
        folder = tmp_path / "tokens" / split
        folder.mkdir(parents=True)
        write_tokens(folder, ["The lamp on Gull Rock went out. " * 20] * count, tiny_tokenizer, "digest")
    command = [sys.executable, "benchmarks/finetune.py", "--shape", "tiny", "--steps", "3", "--documents", "1"]
    done = run([*command, "--tokens", str(tmp_path / "tokens"), "--out", str(tmp_path / "result")])
    assert done.returncode == 0, done.stderr
    result = (tmp_path / "result").read_text()
    assert result == done.stdout
    assert "ours / run_clm: " in result
    assert str(tmp_path) not in result


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the machine from /proc")
def test_serve_compares_the_server_with_the_engine_alone(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/serve.py", "--checkpoint", "tiny", "--precision", "float32"]
    command += ["--threads", "1", "--streams", "1,2", "--requests", "4", "--rounds", "1"]
    done = run([*command, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "result")])
    assert done.returncode == 0, done.stderr
    result = (tmp_path / "result").read_text()
    assert result == done.stdout
    assert "2 streams, server / engine alone: " in result
    assert str(tmp_path) not in result


def test_a_soak_leaves_the_server_as_it_was(tiny_engine_folder: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", "--engine", str(tiny_engine_folder), "--precision", "float32"]
    done = run([*command, "--seconds", "6", "--clients", "8"])
    assert done.returncode == 0, done.stderr
    assert "in use at the end: nothing" in done.stdout


@pytest.mark.skipif(not driver.obstacles(), reason="CUDA runs here")
def test_a_gpu_that_is_not_there_is_reported_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/decode.py", "--checkpoint", "tiny", "--provider", "cuda"]
    done = run([*command, "--contexts", "8", "--new-tokens", "4", "--work", str(tmp_path)])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: provider: CUDA does not run here: ")


def test_guard_compares_limits_with_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    index = index_text(np.array([7, 8, 9, 10, 7, 8, 9, 11], np.uint16))
    build_engine(load_checkpoint(tiny_checkpoint), tiny_checkpoint, tmp_path / "engine", ["int8"], index=index)
    command = [sys.executable, "benchmarks/guard.py", "--engine", str(tmp_path / "engine")]
    done = run([*command, "--rounds", "2", "--requests", "2", "--tokens", "6"])
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0].split(" +")[0].split(" -")[0] for line in done.stdout.splitlines()[2:]] == [
        "no limit again",
        *(f"limit {limit}" for limit in (4, 8, 15, 30)),
    ]
