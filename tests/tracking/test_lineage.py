"""What made a run, and what was changed for it."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from isolated_store import isolated_store
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT
from ruamel.yaml import YAML

from pipeline.files import write_jsonl
from pipeline.tracking import lineage, runs

PARAMETERS = {
    "finetune": {"epochs": 3, "learning_rate": 0.001, "lora": None, "samples": {"prompts": ["", "A"]}},
    "register": {"name": "tales"},
}


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path) -> Iterator[None]:
    with isolated_store(tmp_path):
        yield


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@localhost"]
    done = subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def logged_run() -> Run:
    """A finished run without parameters."""
    with runs.start_run("finetune", {}) as run:
        pass
    return run.client.get_run(run.run_id)


def commit_lock(folder: Path, lock: dict[str, Any]) -> None:
    with (folder / "dvc.lock").open("w") as file:
        YAML().dump(lock, file)
    git("init", "--quiet")
    git("add", "dvc.lock")
    git("commit", "--quiet", "--message", "begin")


def lock_of(parameters: dict[str, Any], data_md5: str = "24f1.dir") -> dict[str, Any]:
    """What DVC writes of a training with these parameters."""
    prepare = {"deps": [{"path": "data", "md5": data_md5}], "params": {"params.yaml": {"prepare": {"seed": 1}}}}
    finetune = {"params": {"params.yaml": {"finetune": parameters["finetune"]}}}
    register = {"params": {"params.yaml": {"register": parameters["register"]}}}
    return {"schema": "2.0", "stages": {"prepare": prepare, "finetune": finetune, "register": register}}


def md5s() -> tuple[str | None, str | None]:
    lock = lineage.read_lock()
    return lineage.data_md5(lock), lineage.base_md5(lock)


def changed(**values: object) -> dict[str, Any]:
    return {**PARAMETERS, "finetune": {**PARAMETERS["finetune"], **values}}


def test_a_run_knows_commit_and_whether_the_tree_was_changed(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("mlflow.db*\nmlartifacts\n")
    for name in ("dvc.lock", "params.yaml"):
        (tmp_path / name).write_text("{}\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "begin")
    commit = git("rev-parse", "HEAD")
    assert lineage.lineage() | {MLFLOW_GIT_COMMIT: commit, "git.dirty": "false"} == lineage.lineage()
    # Every stage that runs changes dvc.lock.
    (tmp_path / "dvc.lock").write_text("stages: {}\n")
    assert lineage.lineage()["git.dirty"] == "false"
    (tmp_path / "params.yaml").write_text("a: 1\n")
    assert lineage.lineage()["git.dirty"] == "true"
    run = logged_run()
    assert run.data.tags[MLFLOW_GIT_COMMIT] == commit
    assert run.data.tags["git.dirty"] == "true"


def test_outside_git_there_is_no_commit() -> None:
    assert {MLFLOW_GIT_COMMIT, "git.dirty"}.isdisjoint(lineage.lineage())


def test_an_experiment_of_dvc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # DVC commits an experiment where nobody looks for it; the commit that it began from is the one to know.
    monkeypatch.setenv("DVC_EXP_NAME", "hazy-lamp")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "f" * 40)
    run = logged_run()
    assert run.info.run_name == "hazy-lamp"
    assert run.data.tags["dvc.experiment"] == "hazy-lamp"
    assert run.data.tags[MLFLOW_GIT_COMMIT] == "f" * 40


@pytest.mark.parametrize("data", ["data", "s3://texts/data"])
def test_the_digests_of_data_and_base_are_those_of_the_lock(tmp_path: Path, data: str) -> None:
    # What is tracked is not always what is read.
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 9999.dir\n  path: data\n")
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\n"
        "stages:\n"
        f"  prepare:\n    deps:\n    - path: {data}\n      md5: 24f1.dir\n"
        "    - path: pipeline/corpus\n      md5: 1111.dir\n"
        "  base:\n    outs:\n    - path: out/base\n      md5: 77aa.dir\n"
        "  tokenize:\n    deps:\n    - path: out/base\n      md5: 0000.dir\n"
    )
    assert md5s() == ("24f1.dir", "77aa.dir")
    run = logged_run()
    assert run.data.tags["dvc.data_md5"] == "24f1.dir"
    assert run.data.tags["dvc.base_md5"] == "77aa.dir"


def test_what_dvc_does_not_hash_has_no_digest(tmp_path: Path) -> None:
    assert md5s() == (None, None)
    # A remote with versions of its own, as of a bucket, is recorded by those.
    (tmp_path / "dvc.lock").write_text("stages:\n  prepare:\n    deps:\n    - path: data\n      files: []\n")
    assert md5s() == (None, None)
    (tmp_path / "dvc.lock").write_text("")
    assert md5s() == (None, None)


def test_nothing_has_changed_since_the_committed_lock(tmp_path: Path) -> None:
    commit_lock(tmp_path, lock_of(PARAMETERS))
    assert lineage.changes(PARAMETERS) == {}
    assert runs.run_name(PARAMETERS) == "tales"


@pytest.mark.parametrize(
    ("parameters", "changes", "name"),
    [
        (changed(epochs=5), {"finetune.epochs": "5"}, "tales: epochs 5"),
        (changed(learning_rate=3e-05), {"finetune.learning_rate": "3e-05"}, "tales: learning_rate 3e-05"),
        (
            changed(lora={"rank": 8, "dropout": 0.0}),
            {"finetune.lora.rank": "8", "finetune.lora.dropout": "0.0", "finetune.lora": "removed"},
            "tales: rank 8, dropout 0.0, lora removed",
        ),
        (
            changed(samples={"prompts": ["a long prompt, of more than forty characters"]}),
            {"finetune.samples.prompts": "changed"},
            "tales: prompts changed",
        ),
        (
            changed(epochs=1, seed=2, dropout=0.5, warmup=0.25),
            {"finetune.epochs": "1", "finetune.seed": "2", "finetune.dropout": "0.5", "finetune.warmup": "0.25"},
            "tales: epochs 1, seed 2, dropout 0.5, 1 more",
        ),
        # The same last name twice.
        (
            changed(seed=2, other={"seed": 3}),
            {"finetune.seed": "2", "finetune.other.seed": "3"},
            "tales: finetune.seed 2, finetune.other.seed 3",
        ),
        # How a model is registered is no part of what it is.
        ({**PARAMETERS, "register": {"name": "others"}}, {}, "others"),
    ],
)
def test_a_run_is_named_by_what_was_changed(
    parameters: dict[str, Any], changes: dict[str, str], name: str, tmp_path: Path
) -> None:
    commit_lock(tmp_path, lock_of(PARAMETERS))
    # DVC changes it while it runs.
    (tmp_path / "dvc.lock").unlink()
    assert lineage.changes(parameters) == changes
    assert runs.run_name(parameters) == name


def test_new_data_is_a_change(tmp_path: Path) -> None:
    commit_lock(tmp_path, lock_of(PARAMETERS, data_md5="0000.dir"))
    (tmp_path / "dvc.lock").write_text(json.dumps(lock_of(PARAMETERS)))
    assert lineage.changes(PARAMETERS) == {"data": "new"}
    assert runs.run_name(PARAMETERS) == "tales: new data"


def test_the_name_of_an_experiment_comes_before_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_lock(tmp_path, lock_of(PARAMETERS))
    monkeypatch.setenv("DVC_EXP_NAME", "hazy-lamp")
    assert runs.run_name(changed(epochs=5)) == "hazy-lamp: epochs 5"


def test_an_empty_lock_is_none(tmp_path: Path) -> None:
    commit_lock(tmp_path, {})
    (tmp_path / "dvc.lock").write_text("")
    git("commit", "--quiet", "--all", "--message", "empty")
    assert lineage.changes({}) == {}


def test_a_removed_key_is_a_change(tmp_path: Path) -> None:
    commit_lock(tmp_path, lock_of(changed(old=1)))
    assert lineage.changes(PARAMETERS) == {"finetune.old": "removed"}


def test_without_a_committed_lock_no_change_is_known(tmp_path: Path) -> None:
    assert lineage.changes(PARAMETERS) == {}
    git("init", "--quiet")
    assert lineage.changes(PARAMETERS) == {}


def test_a_split_is_known_by_its_texts_alone(tmp_path: Path) -> None:
    rows = [{"id": "1", "title": "T", "text": "One.", "source": "a.txt:1"}, {"text": "Two.", "source": "a.txt:2"}]
    renamed = [{**row, "title": "U", "source": "b.txt:9"} for row in rows]
    splits = {
        "same": (rows, renamed, rows[::-1]),
        "other": ([*rows, rows[0]], rows[:1], [{"text": "One.Two."}], [{"text": "Two."}, {"text": "One"}]),
    }
    digests = {name: [] for name in splits}
    for name, contents in splits.items():
        for content in contents:
            write_jsonl(tmp_path / "test.jsonl", content)
            digests[name].append(lineage.digest_texts(tmp_path / "test.jsonl"))
    assert len({*digests["same"]}) == 1
    assert len({*digests["same"], *digests["other"]}) == 5
