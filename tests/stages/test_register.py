"""`register`: it makes one version per set of files, which loads anywhere as the engine that was exported."""

import ast
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from isolated_store import isolated_store
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel
from toy_project import ROOT, Project

from pipeline.decoding import ModelDecoding, SamplingParams
from pipeline.engine import Engine
from pipeline.engine.text import TextGenerator
from pipeline.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl
from pipeline.imports import needed_files
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.stages import register as stage
from pipeline.stages.register import SERVED_MODULE, SIGNATURE, packed_code, register
from pipeline.tokens import load_tokenizer, prompt_ids
from pipeline.tracking import lineage, registry, runs, store
from pipeline.tracking.notes import GAP
from pipeline.tracking.records import record_evaluation
from pipeline.tracking.registry import fetch_model

PROMPT = "The lamp on Gull Rock"
PARAMS = {"max_new_tokens": 40, "seed": 7}
PRESETS = {
    "balanced": SamplingParams(temperature=0.9, min_p=0.02, max_new_tokens=14),
    "faithful": SamplingParams(temperature=0.0, max_new_tokens=10),
    "adventurous": SamplingParams(temperature=1.3, typical_p=0.95, max_new_tokens=16, stop=("q",)),
}

PREDICT_ELSEWHERE = """
import importlib.util, json, sys

BLOCKED = {"torch", "transformers", "optimum", "onnx", "dvc"}
uri, repository, prompt, params = sys.argv[1:]

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} must not be needed")

# The package is installed in this environment as a link to the repository.
sys.meta_path[:] = [Blocker(), *(finder for finder in sys.meta_path if "__editable__" not in repr(finder))]
assert importlib.util.find_spec("pipeline") is None

import mlflow

model = mlflow.pyfunc.load_model(uri)
texts = [model.predict([prompt], params=json.loads(params)) for _ in range(2)]
own = {name: module.__file__ for name, module in sys.modules.items() if name.startswith("pipeline")}
assert own and "pipeline" not in own, own
assert not any(file.startswith(repository) for file in own.values()), own
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def evaluated(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the evaluate stage, with presets, recorded in the project's store."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluate"
    shutil.copytree(project.out / "evaluate", folder)
    write_json(folder / "presets.json", {name: preset.to_mapping() for name, preset in PRESETS.items()})
    with project.entered():
        parameters, parent = read_yaml(project.root / PARAMS_FILE), project.run_of("finetune")
        with runs.start_run("evaluate", parameters, parent_run_id=parent) as run:
            test = project.out / "prepare" / "test.jsonl"
            record_evaluation(run, folder, project.out / "export" / "parity.json", test, parameters)
    return folder


@pytest.fixture(scope="module")
def version(project: Project, evaluated: Path) -> dict[str, Any]:
    """What `register` wrote of the first version."""
    project.run(stage, "out/export", str(evaluated), "out/finetune", "out/prepare/test.jsonl", "out/register")
    with project.entered():
        return noted(project)


def noted(project: Project) -> dict[str, Any]:
    """Return what `register` wrote, with the number under which the registry holds it."""
    written = read_json(project.out / "register" / "version.json")
    found = registry.find_version(store.connect(), **written)
    assert found is not None
    return {**written, "version": int(found.version)}


@pytest.fixture
def entered(project: Project, version: dict[str, Any]) -> Iterator[None]:
    with project.entered():
        store.connect()
        yield


@pytest.fixture(scope="module")
def model(project: Project, version: dict[str, Any]) -> PyFuncModel:
    with project.entered():
        store.connect()
        return mlflow.pyfunc.load_model(f"models:/{version['name']}@champion")


@pytest.fixture
def fresh(project: Project, evaluated: Path, tmp_path: Path) -> Iterator[Project]:
    """The project's files beside a store that holds nothing, not even their runs."""
    shutil.copytree(project.out, tmp_path / "out", ignore=shutil.ignore_patterns("register", "evaluate"))
    shutil.copytree(evaluated, tmp_path / "out" / "evaluate")
    shutil.copy(project.root / PARAMS_FILE, tmp_path)
    with isolated_store(tmp_path):
        yield Project(tmp_path)


def register_files(project: Project) -> dict[str, Any]:
    """Register the project's files; return what the stage writes of them."""
    out = project.out
    register(
        out / "export",
        out / "evaluate",
        out / "finetune",
        out / "prepare" / "test.jsonl",
        out / "register",
        project.params.register_,
    )
    return noted(project)


def store_environment(project: Project) -> dict[str, str]:
    """The environment of a process that knows the store and nothing of the repository."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        "PATH": path,
        "HOME": os.environ.get("HOME", "/"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{project.root}/mlflow.db",
    }


@pytest.mark.usefixtures("entered")
def test_the_first_version_is_champion_and_leads_back_to_run_scores_and_data(
    project: Project, version: dict[str, Any]
) -> None:
    client = store.connect()
    found = client.get_model_version_by_alias(version["name"], "champion")
    assert int(found.version) == version["version"] == 1
    parent = project.run_of("finetune")
    run = client.get_run(found.run_id)
    assert (run.data.tags["mlflow.parentRunId"], run.data.tags[runs.STAGE_TAG]) == (parent, "register")
    details = read_json(project.out / "evaluate" / "details.json")
    precision = details["protocol"]["precision"]
    assert found.tags["pipeline.run_id"] == parent
    assert found.tags[registry.FINGERPRINT_TAG] == version["fingerprint"]
    assert registry.score_of(found) == registry.Score(
        lineage.digest_texts(project.out / "prepare" / "test.jsonl"),
        f"provider cpu, precision {precision}, window_tokens 64, stride_tokens 32",
        details["documents"]["finetuned"]["bits_per_byte"],
    )
    # The run has all of the lineage; the version, what leads to it and what the registry compares.
    assert {"machine.cpu", "library.mlflow"} <= set(run.data.tags)
    assert len(found.tags) <= 8


@pytest.mark.usefixtures("entered")
def test_a_version_has_a_model_with_scores_on_its_data(
    project: Project, evaluated: Path, version: dict[str, Any]
) -> None:
    client = store.connect()
    found = client.get_model_version_by_alias(version["name"], "champion")
    model = client.get_logged_model(found.source.removeprefix("models:/"))
    assert (model.name, model.source_run_id) == (version["name"], found.run_id)
    scores = {own.key: own for own in model.metrics}
    written = read_json(project.out / "evaluate" / "metrics.json")
    assert {name: scores[name].value for name in written} == written
    digest = lineage.digest_texts(project.out / "prepare" / "test.jsonl")[:36]
    assert {(scores[name].dataset_name, scores[name].dataset_digest) for name in written} == {("test", digest)}
    parity = read_json(project.out / "export" / "parity.json")
    for precision, measured in parity.items():
        assert scores[f"{precision}/kl_divergence"].value == measured["kl_divergence"]
        assert scores[f"{precision}/megabytes"].value > 0
    assert model.params["finetune.epochs"] == "2"
    assert model.params["decoding.max_new_tokens"] == "12"
    trained = client.get_run(project.run_of("finetune"))
    assert model.model_id in [output.model_id for output in trained.outputs.model_outputs]
    evaluation = runs.find_run(client, "evaluate", evaluated)
    assert [own.model_id for own in client.get_run(evaluation).inputs.model_inputs] == [model.model_id]


@pytest.mark.usefixtures("entered")
def test_the_card_describes_version_and_model(project: Project, evaluated: Path, version: dict[str, Any]) -> None:
    client = store.connect()
    card = client.get_model_version(version["name"], "1").description
    assert client.get_registered_model(version["name"]).description == card
    bits = read_json(project.out / "evaluate" / "details.json")["documents"]["finetuned"]["bits_per_byte"]
    assert f"| {bits:.3f}{GAP} |" in card
    assert card.startswith(project.params.register_.about or "-")
    assert f"models:/{version['name']}/1" in card
    for run_id in (project.run_of("finetune"), runs.find_run(client, "evaluate", evaluated)):
        assert f"runs/{run_id}" in card
    note = client.get_run(project.run_of("finetune")).data.tags["mlflow.note.content"]
    assert f"[{version['name']} version 1](#/models/{version['name']}/versions/1)" in note


@pytest.mark.usefixtures("entered")
def test_a_version_holds_engine_tokenizer_decoding_presets_parity_and_scores(
    project: Project, evaluated: Path, version: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{version['name']}/1", dst_path=str(tmp_path)))
    artifacts = folder / "artifacts"
    assert set(Model.load(str(folder)).flavors["python_function"]["artifacts"]) == {
        "engine",
        "decoding",
        "presets",
        "parity",
        "scores",
    }
    names = ("details.json", "decoding.json", "presets.json")
    for file in (project.out / "export" / "parity.json", *(evaluated / name for name in names)):
        assert sha256_file(artifacts / file.name) == sha256_file(file)
    engine = project.out / "export" / "engine"
    for file in (file for file in engine.rglob("*") if file.is_file()):
        assert sha256_file(artifacts / "engine" / file.relative_to(engine)) == sha256_file(file)
    (package,) = (folder / "code").iterdir()
    packed = {file.relative_to(package) for file in package.rglob("*") if file.suffix in (".py", ".cu")}
    assert packed == {file.relative_to(ROOT / "pipeline") for file in needed_files(SERVED_MODULE, ROOT)}
    imported = {name.split(".")[0] for file in package.rglob("*.py") for name in imported_names(file)}
    assert (package.name in imported, "pipeline" in imported) == (True, False)
    assert not list(folder.rglob("*.pkl"))
    requirements = (folder / "requirements.txt").read_text()
    assert {line.partition("==")[0] for line in requirements.splitlines()} == {
        *("mlflow", "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers")
    }


def imported_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_packed_code_has_a_name_of_its_own_and_leaves_nothing_imported() -> None:
    path, modules = list(sys.path), set(sys.modules)
    with packed_code() as first, packed_code() as second:
        assert first != second
        assert first.name == second.name
        assert re.fullmatch(r"pipeline_[0-9a-f]{12}", first.name)
        assert importlib.import_module(f"{first.name}.decoding").SamplingParams is not SamplingParams
    assert (sys.path, set(sys.modules)) == (path, modules)
    assert not first.exists()


@pytest.mark.usefixtures("entered")
def test_a_model_is_fetched_as_engine_and_decoding(project: Project, version: dict[str, Any]) -> None:
    folder, decoding = fetch_model(f"models:/{version['name']}@champion")
    assert decoding == ModelDecoding(kept(project), PRESETS)
    ids = prompt_ids(load_tokenizer(folder), PROMPT)
    assert len(Engine.load(folder, provider="cpu").generate([ids], decoding.default)[0].token_ids) > 0


def test_unchanged_inputs_register_nothing(fresh: Project, capsys: pytest.CaptureFixture[str]) -> None:
    first = register_files(fresh)
    assert first["version"] == 1
    capsys.readouterr()
    assert register_files(fresh) == first
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{first['name']} version 1 already contains these files; it is champion"
    assert lines[2].endswith(f"#/models/{first['name']}/versions/1  the model card")
    assert len(store.connect().search_model_versions()) == 1


@pytest.mark.parametrize(
    ("file", "changed"), [("decoding.json", {"temperature": 0.7}), ("presets.json", {"faithful": {"temperature": 0.7}})]
)
def test_changed_decoding_is_another_version(file: str, changed: dict[str, Any], fresh: Project) -> None:
    path = fresh.out / "evaluate" / file
    earlier = read_json(path)
    first = register_files(fresh)
    write_json(path, changed)
    second = register_files(fresh)
    assert (first["version"], second["version"]) == (1, 2)
    assert first["fingerprint"] != second["fingerprint"]
    # No worse on the same split.
    assert int(store.connect().get_model_version_by_alias(first["name"], "champion").version) == 2
    # Going back to the earlier decoding goes back to its version.
    write_json(path, earlier)
    assert register_files(fresh) == first
    assert int(store.connect().get_model_version_by_alias(first["name"], "champion").version) == 1


def test_a_worse_model_on_a_renamed_data_file_is_challenger_until_it_is_promoted(
    fresh: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    first = register_files(fresh)
    test, details_file = fresh.out / "prepare" / "test.jsonl", fresh.out / "evaluate" / "details.json"
    write_jsonl(test, [{**row, "source": "renamed.txt:1"} for row in read_jsonl(test)][::-1])
    details = read_json(details_file)
    details["documents"]["finetuned"]["bits_per_byte"] += 0.5
    write_json(details_file, details)
    second = register_files(fresh)
    line = f"registered {first['name']} version 2 as challenger: its bits per byte are "
    assert capsys.readouterr().out.splitlines()[-4].startswith(line)
    client = store.connect()
    assert int(client.get_model_version_by_alias(first["name"], "champion").version) == 1
    registry.promote(client, second["name"], second["fingerprint"])
    assert int(client.get_model_version_by_alias(first["name"], "champion").version) == 2
    # Another stride gives other figures of the same model.
    details["protocol"]["stride_tokens"] = 8
    details["documents"]["finetuned"]["bits_per_byte"] -= 0.6
    write_json(details_file, details)
    assert register_files(fresh)["version"] == 3
    assert "as challenger: the champion was scored with provider cpu, " in capsys.readouterr().out
    assert int(client.get_model_version_by_alias(first["name"], "champion").version) == 2


def test_a_version_whose_files_are_gone_is_registered_anew(fresh: Project) -> None:
    first = register_files(fresh)
    (description,) = fresh.root.glob("mlartifacts/**/MLmodel")
    description.unlink()
    again = register_files(fresh)
    assert (first["version"], again["version"]) == (1, 2)
    assert first["fingerprint"] == again["fingerprint"]


def test_a_version_cut_off_before_its_alias_is_registered_anew(fresh: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", interrupted)
        with pytest.raises(KeyboardInterrupt):
            register_files(fresh)
    assert not (fresh.out / "register").exists()
    version = register_files(fresh)
    assert version["version"] == 2
    assert int(store.connect().get_model_version_by_alias(version["name"], "champion").version) == 2


def test_the_same_files_have_the_same_fingerprint_in_any_store(fresh: Project, version: dict[str, Any]) -> None:
    assert register_files(fresh)["fingerprint"] == version["fingerprint"]


def test_the_signature_declares_every_decoding_parameter() -> None:
    declared = {param.name: param.default for param in SIGNATURE.params}
    # What a list of texts has no room for, and what a signature can declare as two lists alone.
    expected = set(SamplingParams.__dataclass_fields__) - {"logprobs", "logit_bias"}
    assert set(declared) == expected | {"logit_bias_ids", "logit_bias_values", "preset"}
    assert all(default in (None, []) for default in declared.values())


def test_a_model_loads_in_a_new_process_without_torch_or_this_repository(
    project: Project, version: dict[str, Any], tmp_path: Path
) -> None:
    uri = f"models:/{version['name']}@champion"
    command = [sys.executable, "-c", PREDICT_ELSEWHERE, uri, str(ROOT), PROMPT, json.dumps(PARAMS)]
    done = subprocess.run(
        command, cwd=tmp_path, env=store_environment(project), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    once, twice = json.loads(done.stdout.splitlines()[-1])
    assert once == twice
    assert len(once) == 1
    assert once[0]


def kept(project: Project) -> SamplingParams:
    """The decoding that the evaluation kept."""
    return SamplingParams.from_mapping(read_json(project.out / "evaluate" / "decoding.json"))


def said(project: Project, decoding: SamplingParams) -> str:
    """What the exported engine says after the prompt."""
    (done,) = TextGenerator.load(project.out / "export" / "engine").complete([PROMPT], [decoding])
    return done.text


def test_the_model_says_what_the_engine_says(project: Project, model: PyFuncModel) -> None:
    folder = project.out / "export" / "engine"
    tokenizer = load_tokenizer(folder)
    decoding = SamplingParams.from_mapping(kept(project).to_mapping() | PARAMS)
    (completion,) = Engine.load(folder, provider="cpu").generate([prompt_ids(tokenizer, PROMPT)], decoding)
    (text,) = model.predict([PROMPT], params=PARAMS)
    assert text.rstrip("�") == tokenizer.decode(completion.token_ids, skip_special_tokens=False).rstrip("�")


def test_a_preset_stands_in_place_of_the_models_own_decoding(project: Project, model: PyFuncModel) -> None:
    for name, preset in PRESETS.items():
        assert model.predict([PROMPT], params={"preset": name, "seed": 7}) == [said(project, replace(preset, seed=7))]


def test_several_continuations_of_a_prompt_stand_together(model: PyFuncModel) -> None:
    texts = model.predict([PROMPT, ""], params=PARAMS | {"n": 2})
    assert len(texts) == 4
    assert texts[0] != texts[1]
    assert texts[0] == model.predict([PROMPT], params=PARAMS)[0]


def test_lists_reach_the_decoding(project: Project, model: PyFuncModel) -> None:
    allowed = load_tokenizer(project.out / "export" / "engine").encode("lamp").ids
    (text,) = model.predict([PROMPT], params=PARAMS | {"allowed_token_ids": allowed, "ignore_eos": True})
    assert set(text) <= set("lamp<|endoftext|>")
    bias = {"logit_bias_ids": allowed[:1], "logit_bias_values": [100.0]}
    (text,) = model.predict([PROMPT], params=PARAMS | bias | {"repetition_penalty": 1.0})
    assert len(set(text)) <= 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stop": "x"}, "stop"),
        # The schema knows no ranges: these come from SamplingParams.
        ({"top_p": 1.5}, r"top_p: 1\.5 is out of range, must be in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is out of range, must be at least 1"),
        ({"temperature": -1.0}, r"temperature: -1\.0 is out of range, must be at least 0"),
        ({"logit_bias_ids": [1, 2], "logit_bias_values": [1.0]}, "logit_bias_values: 1 values for 2 ids"),
        ({"banned_token_ids": [-1]}, "banned_token_ids: -1 is out of range"),
        ({"preset": "x"}, "preset: 'x' is none of balanced, faithful, adventurous"),
        ({"preset": 5}, "preset"),
    ],
)
def test_a_wrong_parameter_is_refused(params: dict[str, Any], message: str, model: PyFuncModel) -> None:
    with pytest.raises(MlflowException, match=message) as caught:
        model.predict([PROMPT], params=params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_mlflow_serves_the_model_over_http(project: Project, version: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*(sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{version['name']}@champion")]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log = tmp_path / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=store_environment(project), stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_for_server(f"http://127.0.0.1:{port}/ping", server, log)
        request = {"inputs": [PROMPT], "params": PARAMS}
        once, twice = (post(f"http://127.0.0.1:{port}/invocations", request) for _ in range(2))
        assert once == twice
        assert once[0] == 200
        assert len(once[1]["predictions"]) == 1
        assert once[1]["predictions"][0]
        status, refusal = post(f"http://127.0.0.1:{port}/invocations", request | {"params": {"top_p": 1.5}})
        assert status == 400
        assert "top_p: 1.5 is out of range" in refusal["message"]
        faithful = {"preset": "faithful", "max_new_tokens": 8}
        status, answer = post(f"http://127.0.0.1:{port}/invocations", request | {"params": faithful})
        assert (status, answer["predictions"]) == (200, [said(project, replace(PRESETS["faithful"], max_new_tokens=8))])
        status, refusal = post(f"http://127.0.0.1:{port}/invocations", request | {"params": {"preset": "x"}})
        assert status == 400
        assert "preset: 'x' is none of balanced, faithful, adventurous" in refusal["message"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for_server(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the address answers."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON of the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
