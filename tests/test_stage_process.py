"""A stage stops on SIGTERM, SIGINT or with its DVC, and locks its output folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import stage_process
from pipeline.errors import UserError
from pipeline.files import whole_folder

ROOT = Path(__file__).parents[1]
# Starts the command that follows as DVC does, and waits for it.
DVC = "import subprocess, sys; subprocess.run(sys.argv[1:])"
SHELLS = {
    "no shell": [],
    "a shell that becomes the command": ["/bin/sh", "-c", 'exec "$@"', "sh"],
    "a shell that stays": ["/bin/sh", "-c", '"$@"; exit $?', "sh"],
}
SLOW_STAGE = """
from pathlib import Path

from pipeline.corpus.parallel import map_in_order
from pipeline.files import whole_folder
from pipeline.stage_process import stage_process

out = Path("out") / "slow"
with stage_process(out), whole_folder(out) as partial:
    (partial / "half").touch()
    for result in map_in_order(abs, iter(int, 1), workers=2):
        print(result, flush=True)
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_however_often_it_comes_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stage_process.note_termination() as asked:
        assert not asked.is_set()
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert asked.is_set()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_one_later_does_what_it_did_before(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    came = []
    before = signal.signal(number, lambda number, frame: came.append(number))
    try:
        monkeypatch.setattr(stage_process, "ONE_REQUEST_S", -1)
        with stage_process.note_termination() as asked:
            os.kill(os.getpid(), number)
            assert asked.is_set()
        assert came == [number]
    finally:
        signal.signal(number, before)


def test_ctrl_c_and_the_end_of_dvc_that_follows_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(stage_process.time, "monotonic", lambda: now_s)
    with stage_process.note_termination() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        now_s = 100.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_set()


def test_a_stage_by_hand_is_bound_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stage_process.STAGE_VARIABLE, raising=False)
    monkeypatch.setattr(stage_process, "_runners", None)
    stage_process.end_with_dvc()


@pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS.keys())
def test_a_stage_ends_with_its_dvc_and_so_do_its_workers(
    shell: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | {stage_process.STAGE_VARIABLE: "slow", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DVC, *shell, sys.executable, "-c", SLOW_STAGE]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as dvc:
        try:
            assert dvc.stdout is not None
            assert dvc.stdout.readline() == "0\n"
            monkeypatch.chdir(tmp_path)
            out = Path("out") / "slow"
            refused = pytest.raises(
                UserError, match=r"^out/slow\.lock: another process writes to out/slow; wait for it"
            )
            with refused, stage_process.only_writer(out, wait_s=0):
                pass
        finally:
            dvc.kill()
        dvc.communicate(timeout=30)  # ends only when no process holds the pipe any more
    assert (tmp_path / "out" / "slow.partial" / "half").exists()
    with stage_process.stage_process(out), whole_folder(out) as partial:
        (partial / "whole").touch()
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")) == [
        "slow",
        "slow.lock",
        "slow/whole",
    ]
