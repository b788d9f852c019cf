"""What `python -m pipeline doctor` reports."""

from pathlib import Path

import onnxruntime as ort
import pytest

from pipeline import __main__ as cli
from pipeline import doctor
from pipeline.engine.cuda import driver


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "READ_BYTES", 2**20)


def test_what_runs_and_what_is_missing(
    tiny_engine_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "DRIVER_LIBRARIES", ())
    cli.main(["doctor", "--engine", str(tiny_engine_folder)])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"onnxruntime{'-gpu' if driver.PROVIDER in ort.get_available_providers() else ''} " in shown
    assert "GB/s of memory" in shown
    assert "cpu runs" in shown
    assert "no NVIDIA driver (libcuda) is installed; install one of version" in shown
    assert "holds float32, float16, int8, int4, int8_float16; by default it runs float32 on cpu" in shown


def test_an_engine_that_is_not_there_is_no_obstacle(tmp_path: Path) -> None:
    assert "holds no engine" in doctor.report(tmp_path)


def test_where_an_engine_would_run(tiny_engine_folder: Path) -> None:
    from pipeline.engine.manifest import read_manifest

    manifest = read_manifest(tiny_engine_folder)
    assert doctor._choice(manifest, on_cuda=True) == "float16 on cuda"


def test_a_provider_that_does_not_start_says_why() -> None:
    assert doctor._first_run(driver.PROCESSOR) is None
    if driver.obstacles():
        found = doctor._first_run(driver.PROVIDER)
        assert found is not None
        assert found.startswith("does not run: ")
