"""Several processes fine-tune as one does: the same curves, one run, one that writes."""

import csv
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from isolated_store import isolated_store
from safetensors.torch import load_file
from toy_project import Project, copy_for_finetune, stage_environment

from pipeline.stages import finetune as stage
from pipeline.tracking import store
from pipeline.tracking.runs import find_run

PATHS = ("out/tokenize", "out/base", "out/finetune")
MODULE = ("-m", "pipeline.stages.finetune", *PATHS)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")


def without_dropout(project: Project, folder: Path, **changes: object) -> Path:
    """What `finetune` needs; its processes would draw other dropout than one alone."""
    return copy_for_finetune(project, folder, dropout=0.0, attention_dropout=0.0, **changes)


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=stage_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def torchrun(folder: Path, *what: str) -> str:
    return run(folder, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what)


def losses(folder: Path, split: str) -> list[tuple[int, float]]:
    with (folder / "out" / "finetune" / f"loss_{split}.csv").open(newline="") as lines:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(lines)]


def check_like_one(folder: Path, alone: Path) -> None:
    """Alike within what bfloat16 rounds, where the processor has it."""
    for split in ("train", "validation"):
        expected, found = losses(alone, split), losses(folder, split)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=0.02)
    weights, reference = (
        load_file(each / "out" / "finetune" / "checkpoint" / "model.safetensors") for each in (folder, alone)
    )
    assert weights.keys() == reference.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, reference[name], atol=0.02, rtol=0)


@pytest.fixture(scope="module")
def alone(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training in one process: this one, as a new one would spend most of its time on imports."""
    folder = without_dropout(project, tmp_path_factory.mktemp("alone"))
    Project(folder).run(stage, *PATHS)
    return folder


def test_two_processes_learn_what_one_does_and_record_it_once(project: Project, alone: Path, tmp_path: Path) -> None:
    folder = without_dropout(project, tmp_path / "two")
    said = torchrun(folder, *MODULE)
    check_like_one(folder, alone)
    assert said.count("step 0 of") == 1
    assert "Warning" not in said
    with isolated_store(folder):
        client = store.connect()
        (run,) = client.search_runs([store.experiment_id(client)])
        assert run.info.run_id == find_run(client, "finetune", folder / "out" / "finetune")
        assert run.info.status == "FINISHED"
        assert run.data.tags["finetune.batches_per_step"] == "2"
        history = client.get_metric_history(run.info.run_id, "validation_loss")
        assert [(point.step, point.value) for point in history] == losses(folder, "validation")
    assert not list((folder / ".resume" / "finetune").iterdir())


def test_steps_of_one_window_leave_a_process_without_one(project: Project, tmp_path: Path) -> None:
    alone, folder = (
        without_dropout(project, tmp_path / name, batch_tokens=4, epochs=0.2, evaluations=1) for name in ("one", "two")
    )
    Project(alone).run(stage, *PATHS)
    torchrun(folder, *MODULE)
    check_like_one(folder, alone)
    assert len(losses(folder, "train")) == 12


@pytest.mark.slow
def test_weights_shared_among_processes_are_trained_saved_and_gathered(
    project: Project, alone: Path, tmp_path: Path
) -> None:
    folder = without_dropout(project, tmp_path / "fsdp", fsdp=True)
    torchrun(folder, str(Path(__file__).with_name("fsdp_on_cpu.py")))
    check_like_one(folder, alone)


def test_processes_with_different_parameters_are_refused(project: Project, tmp_path: Path) -> None:
    folders = [without_dropout(project, tmp_path / str(rank), seed=rank) for rank in range(2)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, *MODULE],
            cwd=folder,
            env=stage_environment(
                folder, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    for lines in said:
        assert "finetune: the 2 processes have different parameters, data, base, code or libraries; start all" in lines
        assert "Traceback" not in lines
