import os
import signal
import sys

import pytest

from pipeline import process

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM")


def test_sigterm_is_noted_however_often_it_comes_at_once() -> None:
    with process.termination_noted() as asked:
        assert not asked.is_set()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_set()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_another_one_later_does_what_it_did_before(monkeypatch: pytest.MonkeyPatch) -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        monkeypatch.setattr(process, "ONE_REQUEST_S", -1)
        with process.termination_noted() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.is_set()
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stage_by_hand_is_bound_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(process.STAGE_VARIABLE, raising=False)
    monkeypatch.setattr(process.ctypes, "CDLL", None)
    process.end_with_dvc()
