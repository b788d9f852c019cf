"""`finetune`: its checkpoint, curves and metrics agree with each other and with its run."""

import csv
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from isolated_store import isolated_store
from mlflow import MlflowClient
from toy_project import Project
from transformers import GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file, write_json
from pipeline.params.finetune import FinetuneParams
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.stages.finetune import finetune
from pipeline.tokens import TOKENIZER_FILE, load_tokenizer, load_tokens, tokenizer_sha256
from pipeline.tracking import lineage, runs, store

DETAILS = {
    *("train_loss", "validation_loss", "validation_perplexity", "base_validation_loss"),
    *("best_step", "steps", "train_tokens"),
}


def digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()
    }


def curve(file: Path) -> list[tuple[int, float]]:
    with file.open(newline="") as lines:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(lines)]


@pytest.fixture
def client(project: Project) -> Iterator[MlflowClient]:
    with project.entered():
        yield store.connect()


@pytest.fixture
def run_id(project: Project, client: MlflowClient) -> str:
    return project.run_of("finetune")


def test_the_stage_writes_what_later_stages_read(project: Project) -> None:
    assert {file.name for file in (project.out / "finetune").iterdir()} == {
        *("checkpoint", "loss_train.csv", "loss_validation.csv", "metrics.json", "details.json")
    }


def test_the_checkpoint_loads_with_the_tokenizer_of_the_base(project: Project) -> None:
    checkpoint, base = project.out / "finetune" / "checkpoint", project.out / "base"
    model, loading = GPT2LMHeadModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.use_cache
    assert not list(checkpoint.glob("*.bin"))
    assert load_tokenizer(checkpoint).get_vocab() == load_tokenizer(base).get_vocab()
    assert sha256_file(checkpoint / "model.safetensors") != sha256_file(base / "model.safetensors")


def test_the_curves_begin_at_the_base_and_agree_with_the_details(project: Project) -> None:
    out, params = project.out / "finetune", project.params.finetune
    details, validation = read_json(out / "details.json"), curve(out / "loss_validation.csv")
    assert len(validation) == params.evaluations + 1
    assert validation[0] == (0, details["base_validation_loss"])
    best_step, best_loss = min(validation[1:], key=lambda point: point[1])
    assert (details["best_step"], details["validation_loss"]) == (best_step, best_loss)
    assert details["validation_perplexity"] == pytest.approx(math.exp(best_loss))
    assert details["validation_loss"] < details["base_validation_loss"]
    assert curve(out / "loss_train.csv")[-1] == (details["steps"], details["train_loss"])
    tokens = load_tokens(project.out / "tokenize" / "train", tokenizer_sha256(project.out / "base"))
    # An end-of-text ends one document and begins the next; in the windows it stands twice.
    assert details["train_tokens"] == len(tokens.tokens) + len(tokens) - 1


def test_figures_are_numbers_of_the_training_alone(project: Project) -> None:
    # A time, an id or a path would differ from one run to the next.
    details = read_json(project.out / "finetune" / "details.json")
    assert set(details) == DETAILS
    assert all(type(value) in (int, float) for value in details.values())
    metrics = read_json(project.out / "finetune" / "metrics.json")
    assert metrics == {name: details[name] for name in ("base_validation_loss", "validation_loss")}


def test_the_same_seed_trains_the_same_model(project: Project, tmp_path: Path) -> None:
    again = tmp_path / "finetune"
    with isolated_store(tmp_path), runs.start_run("finetune", {}) as run:
        finetune(project.out / "tokenize", project.out / "base", again, project.params.finetune, run)
    assert digests(again) == digests(project.out / "finetune")


def test_the_run_has_parameters_lineage_and_curves(project: Project, client: MlflowClient, run_id: str) -> None:
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags[runs.STAGE_TAG] == "finetune"
    assert run.data.tags["finetune.precision"] in ("float32", "bfloat16")
    parameters = read_yaml(project.root / PARAMS_FILE)
    made_by = {section: parameters[section] for section in ("prepare", "base", "finetune")}
    assert run.data.params == {name: str(value) for name, value in lineage.flatten(made_by).items()}
    for name in ("train", "validation"):
        history = client.get_metric_history(run_id, f"{name}_loss")
        expected = curve(project.out / "finetune" / f"loss_{name}.csv")
        assert [(point.step, point.value) for point in history] == expected
    finals = {name.removeprefix("final/"): value for name, value in run.data.metrics.items() if "final/" in name}
    assert finals == pytest.approx(read_json(project.out / "finetune" / "details.json"))


def test_the_run_has_a_table_of_samples_at_every_evaluation(
    project: Project, client: MlflowClient, run_id: str, tmp_path: Path
) -> None:
    params = project.params.finetune
    table = json.loads(Path(client.download_artifacts(run_id, "samples.json", str(tmp_path))).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    steps = [step for step, _ in curve(project.out / "finetune" / "loss_validation.csv")]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in steps for prompt in params.samples.prompts
    ]
    assert {row["temperature"] for row in rows} == {params.samples.temperature}
    assert {row["max_new_tokens"] for row in rows} == {params.samples.max_new_tokens}
    assert all(isinstance(row["text"], str) for row in rows)


def test_the_run_names_its_data_by_digest(project: Project, client: MlflowClient, run_id: str) -> None:
    found = {record.dataset.name: record.dataset.digest for record in client.get_run(run_id).inputs.dataset_inputs}
    digest = tokenizer_sha256(project.out / "base")
    assert found == {
        split: load_tokens(project.out / "tokenize" / split, digest).sha256[:36] for split in ("train", "validation")
    }


def refused(project: Project, base: Path, folder: Path, params: FinetuneParams) -> str:
    """The one line in which the stage refuses; nothing is left then, and the run has failed."""
    with isolated_store(folder):
        with pytest.raises(UserError) as caught, runs.start_run("finetune", {}) as run:
            finetune(project.out / "tokenize", base, folder / "out", params, run)
        assert run.client.get_run(run.run_id).info.status == "FAILED"
    assert not list(folder.glob("out*"))
    return str(caught.value)


def test_another_tokenizer_is_refused(project: Project, tmp_path: Path) -> None:
    base = Path(shutil.copytree(project.out / "base", tmp_path / "base"))
    tokenizer = read_json(base / TOKENIZER_FILE)
    tokenizer["model"]["merges"].pop()
    write_json(base / TOKENIZER_FILE, tokenizer)
    message = refused(project, base, tmp_path, project.params.finetune)
    assert "train: was written with another tokenizer than the model's" in message


def test_a_window_longer_than_the_base_has_positions_is_refused(project: Project, tmp_path: Path) -> None:
    params = project.params.finetune.model_copy(update={"context_length": 65})
    message = refused(project, project.out / "base", tmp_path, params)
    assert message.startswith("finetune.context_length: 65 is more than the base's 64 positions; lower it")


def test_training_goes_on_without_prompts_to_sample(project: Project, tmp_path: Path) -> None:
    params = project.params.finetune
    silent = params.samples.model_copy(update={"prompts": []})
    params = params.model_copy(update={"samples": silent, "epochs": 0.5, "evaluations": 1})
    with isolated_store(tmp_path), runs.start_run("finetune", {}) as run:
        finetune(project.out / "tokenize", project.out / "base", tmp_path / "out", params, run)
        assert [file.path for file in run.client.list_artifacts(run.run_id)] == []
