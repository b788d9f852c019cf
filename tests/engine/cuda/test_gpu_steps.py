"""`make gpu` without a GPU: with stand-ins for CUDA's libraries, and mostly with small commands in place of steps."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from pipeline.engine.cuda import driver

ROOT = Path(__file__).parents[3]
HEAD = """
import sys
sys.path.insert(0, "benchmarks")
import gpu
"""
TAIL = "\ngpu.main()\n"
CHILD = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def start(script: str, out: Path, libraries: Path) -> subprocess.Popen[str]:
    """The driver with the stand-ins, and the table of steps that the script makes of the real one."""
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + script + TAIL, "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes(out: Path) -> dict[str, str]:
    """The outcome of each step, in the order of the file."""
    return dict(re.findall(r"^== (\w+): (.*)$", out.read_text(), re.MULTILINE))


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_whatever_becomes_of_a_step_the_next_one_runs(libraries: Path, tmp_path: Path) -> None:
    script = f"""
figure = {{"bits per byte of the tales": r"^evaluated: ([\\d.]+)"}}
gpu.STEPS = [
    gpu.Step("good", [["-c", "import os; os.mkdir('kept'); print('1 %', '9 %', sep='\\\\r')"],
                      ["-c", "import os; print('evaluated: 1.4785', os.listdir('kept'))"]], figure),
    gpu.Step("bad", [["-c", "print('no such flag'); raise SystemExit(3)"], ["-c", "print('not reached')"]], {{}}),
    gpu.Step("silent", [["-c", "print('evaluated: badly')"]], figure),
    gpu.Step("crash", [["-c", "import os; print('before', flush=True); os.abort()"]], {{}}),
    gpu.Step("slow", [["-c", {CHILD + "; import time; time.sleep(600)"!r}]], {{}}, limit_s=5),
    gpu.Step("long", [["-c", "for line in range(1000): print('line', line)"]], {{}}),
]
"""
    out = tmp_path / "new" / "gpu.txt"
    process = start(script, out, libraries)
    shown, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (1, "")
    found = outcomes(out)
    assert list(found) == ["good", "bad", "silent", "crash", "slow", "long"]
    assert list(found.values()) == [
        "passed",
        "failed: exit code 3",
        "failed: its output does not have: bits per byte of the tales",
        "failed: ended by SIGABRT",
        "failed: took too long",
        "passed",
    ]
    lines = shown.splitlines()
    assert lines[1] == "1 of 6: good (at most 8:00 min)"
    assert [line.partition(", ")[2] for line in lines[2::2]] == list(found.values())
    text = out.read_text()
    for line in ("no such flag", "before", "line 999", "\n9 %\n"):
        assert line in text
    for absent in ("not reached\n", "line 800\n", "\n1 %", str(tmp_path)):
        assert absent not in text
    assert "\nbits per byte of the tales " in text
    assert re.search(r"^bits per byte of the tales +1\.46 to 1\.50 +1\.4785$", text, re.MULTILINE)
    assert re.search(r"^new tokens per second, batch 1 +[\d,]+ to [\d,]+ +-$", text, re.MULTILINE)
    assert re.search(r"^libraries  .*torch ", text, re.MULTILINE)
    assert has_ended(int(re.search(r"== slow.*\n.*\n(\d+)\n", text)[1]))
    assert list(out.parent.iterdir()) == [out]


def test_all_steps_passed(libraries: Path, tmp_path: Path) -> None:
    process = start("gpu.STEPS = [gpu.Step('one', [['-c', '']], {})]", tmp_path / "gpu.txt", libraries)
    process.communicate(timeout=100)
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_done(number: int, libraries: Path, tmp_path: Path) -> None:
    script = f"""
gpu.STEPS = [
    gpu.Step("good", [["-c", "print('done')"]], {{}}),
    gpu.Step("slow", [["-c", {CHILD + "; import time; time.sleep(600)"!r}]], {{}}),
    gpu.Step("later", [["-c", ""]], {{}}),
]
"""
    out = tmp_path / "gpu.txt"
    process = start(script, out, libraries)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("2 of 3"):
            break
    assert outcomes(out) == {"good": "passed"}
    (child,) = wait_for_child(process.pid)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert outcomes(out) == {"good": "passed", "slow": "interrupted"}
    assert has_ended(child.pid)


def wait_for_child(pid: int) -> list[psutil.Process]:
    while not (children := psutil.Process(pid).children()):
        pass
    return children


def test_the_first_step_with_the_stand_ins(libraries: Path, tmp_path: Path) -> None:
    """They compute nothing, and that is found out."""
    process = start("gpu.STEPS = gpu.STEPS[:1]", tmp_path / "gpu.txt", libraries)
    process.communicate(timeout=300)
    assert process.returncode == 1
    text = (tmp_path / "gpu.txt").read_text()
    assert "runs, and gives wrong results" in " ".join(text.split())
    assert outcomes(tmp_path / "gpu.txt")["doctor"].startswith("failed: its output does not have: CUDA, according to")


@pytest.mark.skipif(driver.driver() is not None, reason="an NVIDIA driver is installed")
def test_without_a_gpu_one_line_says_so_and_no_file_is_written(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "gpu.txt")]
    # Nothing says where the project is.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no GPU here: no NVIDIA driver (libcuda) is installed\n"
    assert not list(tmp_path.iterdir())


def test_every_figure_has_a_prediction(gpu: ModuleType) -> None:
    assert list(gpu.predictions()) == [name for step in gpu.STEPS for name in step.figures]


def test_figures_are_found_in_what_the_steps_print(gpu: ModuleType) -> None:
    def found(name: str, output: str) -> str | None:
        (pattern,) = (step.figures[name] for step in gpu.STEPS if name in step.figures)
        match = re.search(pattern, output, re.MULTILINE)
        return match and match[1]

    cuda, bandwidth, tests, *_, provider, score = gpu.predictions()
    doctor = "cpu            runs\ncuda           runs\ngpu bandwidth  4,123 GB/s, read and written"
    assert (found(cuda, doctor), found(bandwidth, doctor)) == ("runs", "4,123")
    assert found(cuda, "cuda           runs, and gives wrong results") is None
    assert found(tests, "===== 31 passed, 40 deselected in 12.34s =====") == "31"
    assert found(tests, "===== 1 passed, 30 skipped, 40 deselected in 1.23s =====") is None
    report = (ROOT / "benchmarks" / "results" / "decode-2-cores.txt").read_text()
    report = report.replace("engine-float32           32", "engine-float16           16")
    assert found("new tokens per second, batch 1", report) == "26.0"
    assert found("new tokens per second, batch 8", report) == "125.5"
    assert found("new tokens per second, batch 64", report) is None
    trained = "run_clm        171.7    11.1%      1893     8192\nours           285.4    18.4%      1786     8129"
    assert found("fine-tuned tokens per second", trained) == "285.4"
    assert found("share of the GPU's peak in fine-tuning", trained) == "18.4%"
    evaluated = "evaluated on cuda in float16: 1.4785 bits per byte"
    assert (found(provider, evaluated), found(score, evaluated)) == ("cuda in float16", "1.4785")
