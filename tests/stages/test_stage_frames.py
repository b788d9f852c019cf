"""Every stage's process ends with its DVC, and alone writes its folder."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from dag import ROOT, STAGES, arguments

from pipeline import resume, stage_process
from pipeline.params.section import PARAMS_FILE


@pytest.mark.parametrize("stage", STAGES)
def test_it_ends_with_dvc_and_is_kept_out_while_another_writes(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"pipeline.stages.{stage}").main
    folder = resume.RESUME_FOLDER / stage if stage == "finetune" else Path(arguments(stage)[-1])
    watched: list[list[int]] = []
    shutil.copy(ROOT / PARAMS_FILE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(stage_process.STAGE_VARIABLE, stage)
    monkeypatch.setattr(stage_process, "_end_after", watched.append)
    monkeypatch.setattr(stage_process, "LOCK_WAIT_S", 0)
    monkeypatch.setattr(resume, "LOCK_WAIT_S", 0)
    monkeypatch.setattr(sys, "argv", [stage, *arguments(stage)])
    with stage_process.only_writer(folder, wait_s=0), pytest.raises(SystemExit):
        main()
    assert len(watched) == 1
    assert capsys.readouterr().err == (
        f"error: {folder}.lock: another process writes to {folder}; wait for it, or end it\n"
    )
