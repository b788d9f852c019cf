"""Everything up to a GPU, with stand-ins for its libraries: the calls are real, but nothing is computed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
import numpy as np
from pipeline.engine import Engine
from pipeline.engine.cuda import driver

assert not driver.obstacles(), driver.obstacles()
engine = Engine.load(sys.argv[1], provider="cuda", precision=sys.argv[2], slots=3)
session, loop = engine.session, engine.scheduler._loop
assert (session.provider, session.slots) == ("cuda", 4)
session.prefill(0, [1, 2, 3], 0)
session.decode([1, 2], [3, 0])
session.decode([1, 2], [4, 1])
session.read([1, 2, 3], 0)
session.copy(0, 1, 3)
print("ready", flush=True)
loop.park(2, 4)
loop.step(3)
assert loop.log(4, wait=True).shape == loop.log(4, wait=False).shape == (4, 8)
assert loop.logits(0).shape == (engine.manifest.vocabulary_size,)
"""


def run(libraries: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("precision", "least_kernels"), [("float16", 10), ("int8_float16", 15)])
def test_an_engine_loads_captures_and_replays(
    precision: str, least_kernels: int, tiny_engine_folder: Path, libraries: Path
) -> None:
    begin, _, end = run(libraries, "-c", SCRIPT, str(tiny_engine_folder), precision).partition("ready\n")
    captures = [line for line in begin.splitlines() if line.startswith("captured")]
    # One for 1, 2 and 4 rows each, and none for prefill; nothing is copied between host and device in a step.
    assert len(captures) == 3
    assert all(line.endswith(" 0 copies") and int(line.split()[1]) >= least_kernels for line in captures)
    assert [line for line in begin.splitlines() if line.startswith("drawn")] == [f"drawn: {n} rows" for n in (1, 2, 4)]
    assert end.splitlines() == ["replayed", "drawn: 4 rows"]


def test_a_gpu_that_computes_wrongly_is_found_out(libraries: Path, tiny_engine_folder: Path) -> None:
    shown = run(libraries, "-m", "pipeline", "doctor", "--engine", str(tiny_engine_folder))
    assert "runs, and gives wrong results" in " ".join(shown.split())
