"""The real `dvc repro` on a tiny configuration, in a copy of this repository with its own history."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML

from pipeline.files import sha256_file
from pipeline.tracking.registry import FINGERPRINT_TAG
from pipeline.tracking.store import EXPERIMENT
from pipeline.training.state import WHOLE_FILE, step_of

ROOT = Path(__file__).parents[1]
STAGES = ["prepare", "base", "tokenize", "finetune", "export", "tune", "evaluate", "register"]
COMMITTED_TEMPERATURE = YAML().load(ROOT / "params.yaml")["evaluate"]["decoding"]["temperature"]
TINY = {
    "base.source": "scratch",
    "base.scratch": {"vocabulary_size": 400, "context_length": 128, "layers": 1, "heads": 2, "width": 32, "seed": 1},
    "finetune.batch_tokens": 256,
    "finetune.epochs": 0.25,
    "finetune.evaluations": 4,
    "finetune.samples.max_new_tokens": 8,
    "export.parity.positions": 1000,
    "tune.trials": 3,
    "tune.finalists": 2,
    "tune.samples": 4,
    "tune.max_new_tokens": 16,
    "evaluate.stride_tokens": 64,
    "evaluate.samples": 3,
    "evaluate.decoding.max_new_tokens": 16,
}

LOAD = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "optimum", "onnx", "dvc"}:
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Block())
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/harbour-tales@champion")
texts = [model.predict(["The lamp on Gull Rock"], params={"max_new_tokens": 40, "seed": 7}) for _ in range(2)]
print(json.dumps(texts))
"""


class Clone:
    """A copy of the repository's files under `folder`, committed, in the tiny configuration, with its data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        self.set(**TINY)
        self.run("git", "init", "--quiet")
        self.run("git", "add", "--all")
        self.run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "tiny")
        self.run("dvc", "pull", "--quiet", "data.dvc", "base.dvc")

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_"))}
        private = self.folder.parent / f"{self.folder.name}-dvc"
        return inherited | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "DVC_GLOBAL_CONFIG_DIR": str(private / "config"),
            "DVC_SITE_CACHE_DIR": str(private / "cache"),
            # More threads cost more than they save in so small a model.
            "OMP_NUM_THREADS": "1",
            # DVC runs the stages through it: the one that every system has.
            "SHELL": "/bin/sh",
        }

    def run(self, *command: str) -> str:
        """Run a command in the clone and return its output; fail with the output if the command fails."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in the clone, in its own process group; the caller reads its stderr."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def set(self, **values: Any) -> None:
        """Change keys of params.yaml, named as `section.key`."""
        yaml, path = YAML(), self.folder / "params.yaml"
        params = yaml.load(path)
        for key, value in values.items():
            *sections, name = key.split(".")
            section = params
            for part in sections:
                section = section[part]
            section[name] = value
        yaml.dump(params, path)

    def take(self, other: "Clone", *stages: str) -> None:
        """Take over what DVC knows of these stages, and of no others, from a clone of the same configuration."""
        yaml = YAML()
        lock = yaml.load(other.folder / "dvc.lock")
        lock["stages"] = {stage: lock["stages"][stage] for stage in stages}
        yaml.dump(lock, self.folder / "dvc.lock")
        files = Path(".dvc") / "cache" / "files"
        shutil.copytree(other.folder / files, self.folder / files, dirs_exist_ok=True)

    def repro(self) -> list[str]:
        """Run `dvc repro` and return the stages that ran."""
        output = self.run("dvc", "repro")
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]

    def saved_step(self) -> int:
        """Return the step of the newest whole checkpoint of a fine-tuning that runs or was killed; 0 without one."""
        found = self.folder.glob(f".resume/finetune/*/checkpoint-*/{WHOLE_FILE}")
        return max((step_of(file.parent) for file in found), default=0)

    def version(self) -> int:
        """Return the number of the version that these outputs are."""
        fingerprint = self.read_json("out/register/version.json")["fingerprint"]
        # MLflow would keep a store open that a test deletes.
        with sqlite3.connect(self.folder / "mlflow.db") as store:
            query = "SELECT version FROM model_version_tags WHERE key = ? AND value = ?"
            ((number,),) = store.execute(query, (FINGERPRINT_TAG, fingerprint))
        return int(number)

    def times(self, name: str) -> dict[str, int]:
        """Return when each file under a folder was written."""
        return {str(file): file.stat().st_mtime_ns for file in (self.folder / name).rglob("*") if file.is_file()}

    def runs(self) -> list[str]:
        """Return the names of the runs in the clone's store."""
        with sqlite3.connect(self.folder / "mlflow.db") as store:
            return [name for (name,) in store.execute("SELECT name FROM runs")]

    def read_json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def make_clone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Clone]:
    return lambda: Clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def built(make_clone: Callable[[], Clone]) -> tuple[Clone, list[str]]:
    """A clone in which every stage has run, and the names of those stages. Tests leave it built."""
    clone = make_clone()
    return clone, clone.repro()


def load_in_new_process(clone: Clone, elsewhere: Path) -> list[list[str]]:
    """Return two predictions of the champion, made outside the repository and without what only training needs."""
    environment = {name: value for name, value in clone.environment.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, f"sqlite:///{clone.folder / 'mlflow.db'}"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts: list[list[str]] = json.loads(done.stdout)
    return texts


def wait_until(reached: Callable[[], bool], repro: subprocess.Popen[str]) -> None:
    """Wait until it is true; fail if `dvc repro` ends before that."""
    deadline = time.monotonic() + 300
    while not reached():
        assert repro.poll() is None, f"dvc repro ended early\n{repro.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_stage_runs_and_the_model_loads_elsewhere(built: tuple[Clone, list[str]], tmp_path: Path) -> None:
    clone, ran = built
    assert sorted(ran) == sorted(STAGES)
    first, second = load_in_new_process(clone, tmp_path)
    assert first == second
    assert len(first) == 1
    assert first[0]


def test_nothing_runs_twice(built: tuple[Clone, list[str]]) -> None:
    assert "up to date" in built[0].run("dvc", "repro")


def test_a_decoding_parameter_reruns_evaluation_and_registration_only(built: tuple[Clone, list[str]]) -> None:
    clone, _ = built
    before = clone.version()
    clone.set(**{"evaluate.decoding.temperature": 0.55})
    assert clone.repro() == ["evaluate", "register"]
    assert clone.version() == before + 1
    clone.set(**{"evaluate.decoding.temperature": COMMITTED_TEMPERATURE})
    # DVC has kept the earlier evaluation; the registry has to be told.
    assert clone.repro() == ["register"]
    assert clone.version() == before
    clone.set(**{"evaluate.decoding.temperature": 0.55})
    clone.repro()


@pytest.mark.slow
def test_queued_experiments_land_in_the_store_under_their_names_and_over_each_other_in_plots(
    built: tuple[Clone, list[str]],
) -> None:
    clone, _ = built
    clone.run("dvc", "exp", "run", "--queue", "-S", "finetune.learning_rate=0.001,0.002", "finetune")
    clone.run("dvc", "exp", "run", "--run-all")
    names = set(clone.run("dvc", "exp", "list", "--name-only").split()) - {"main:", "master:"}
    assert len(names) == 2
    client = MlflowClient(f"sqlite:///{clone.folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    runs = [
        run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name.partition(":")[0] in names
    ]
    assert {run.data.params["finetune.learning_rate"] for run in runs} == {"0.001", "0.002"}
    assert len(runs) == 2
    plots = clone.run("dvc", "plots", "diff", *sorted(names), "--targets", "Loss", "--json")
    assert all(f'"rev": "{name}"' in plots for name in names)


@pytest.mark.slow
def test_advise_fine_tunes_beside_the_workspace_and_nothing_twice(built: tuple[Clone, list[str]]) -> None:
    clone, _ = built
    status, outputs = clone.run("git", "status", "--porcelain"), clone.times("out")
    command = (sys.executable, "-m", "pipeline", "advise", "--shares", "0.5")
    # All of the text is what `built` has run.
    assert clone.run(*command).count("Running stage 'finetune'") == 1
    half, whole = clone.read_json("out/advise/advice.json")["points"]
    assert (half["share"], whole["share"]) == (0.5, 1.0)
    assert 0.3 < half["train_tokens"] / whole["train_tokens"] < 0.7
    details = clone.read_json("out/finetune/details.json")
    assert {name: details[name] for name in whole.keys() & details.keys()}.items() <= whole.items()
    assert any(name.startswith("advise-0.5: ") for name in clone.runs())
    assert "Running stage" not in clone.run(*command)
    assert clone.read_json("out/advise/advice.json")["points"] == [half, whole]
    assert clone.run("git", "status", "--porcelain") == status
    shutil.rmtree(clone.folder / "out" / "advise")
    assert clone.times("out") == outputs


def test_a_deleted_store_is_filled_again(built: tuple[Clone, list[str]], tmp_path: Path) -> None:
    clone, _ = built
    (clone.folder / "mlflow.db").unlink()
    shutil.rmtree(clone.folder / "mlartifacts")
    output = clone.run(sys.executable, "-m", "pipeline", "restore")
    assert "does not hold" in output
    assert clone.version() == 1
    assert load_in_new_process(clone, tmp_path)
    assert "does not hold" not in clone.run(sys.executable, "-m", "pipeline", "restore")
    assert "up to date" in clone.run("dvc", "repro")


def test_a_kill_in_the_middle_is_recovered_from_and_two_clones_agree(
    built: tuple[Clone, list[str]], make_clone: Callable[[], Clone]
) -> None:
    first, _ = built
    second = make_clone()
    shutil.copy(first.folder / "params.yaml", second.folder)
    repro = second.start("dvc", "repro")
    wait_until((second.folder / "out" / "finetune.partial").exists, repro)
    os.killpg(repro.pid, signal.SIGKILL)
    repro.communicate()
    assert not (second.folder / "out" / "finetune").exists()
    assert second.repro() == ["finetune", "export", "tune", "evaluate", "register"]
    assert not list((second.folder / "out").glob("*.partial"))
    # Whoever runs the same commit gets the same bytes.
    locks = [YAML(typ="safe").load(clone.folder / "dvc.lock")["stages"] for clone in (first, second)]
    for stage in STAGES:
        assert locks[0][stage] == locks[1][stage], stage


@pytest.mark.slow
def test_a_fine_tuning_resumes_when_dvc_is_killed_alone_or_with_it(
    built: tuple[Clone, list[str]], make_clone: Callable[[], Clone]
) -> None:
    whole, clone = built[0], make_clone()
    clone.take(whole, "prepare", "base", "tokenize")
    alone = clone.start("dvc", "repro", "finetune")
    wait_until(lambda: clone.saved_step() > 0, alone)
    alone.kill()
    # The pipe closes when the stage ends, because the stage holds its other end.
    _, said = alone.communicate(timeout=60)
    assert "stopped after step " in said, said
    stopped_at = int(said.split("stopped after step ")[1].split(";")[0])
    assert stopped_at == clone.saved_step()
    assert not (clone.folder / "out" / "finetune").exists()
    (run_file,) = clone.folder.glob(".resume/finetune/*/run.json")
    run_id = clone.read_json(str(run_file))["run_id"]

    both = clone.start("dvc", "repro", "finetune")
    wait_until(lambda: clone.saved_step() > stopped_at, both)
    os.killpg(both.pid, signal.SIGKILL)
    _, said = both.communicate(timeout=60)
    assert f"resuming from step {stopped_at} of the interrupted fine-tuning" in said
    assert "stopped after step " not in said

    going_on_from = clone.saved_step()
    said = clone.run("dvc", "repro", "finetune")
    assert f"resuming from step {going_on_from} of the interrupted fine-tuning" in said
    client = MlflowClient(f"sqlite:///{clone.folder / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == "FINISHED"
    weights = Path("out") / "finetune" / "checkpoint" / "model.safetensors"
    assert sha256_file(clone.folder / weights) == sha256_file(whole.folder / weights)
    assert clone.saved_step() == 0
