"""The files in deploy/ agree with the server and with each other; no container is run."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import requests
from dag import ROOT
from packaging.requirements import Requirement
from served_model import running_server

from pipeline.imports import PACKAGE, needed_files
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.serving.openai import Outcome

DEPLOY = ROOT / "deploy"
COMPOSE = read_yaml(DEPLOY / "compose.yaml")
CUDA_COMPOSE = read_yaml(DEPLOY / "compose.cuda.yaml")
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "pipeline.json").read_text(encoding="utf-8"))
ALERTS = read_yaml(DEPLOY / "alerts.yaml")
TARGETS = ("cpu", "cuda", "mlflow")
SECRET = re.compile(r"KEY|PASSWORD|SECRET|TOKEN")
EXACT_TAG = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w.-]+)?")
RUN_BY_MLFLOW = "pyfunc.py"
"""The module of `pipeline.serving` that only the registered model runs, not the server."""

each_service = pytest.mark.parametrize("name", COMPOSE["services"])
each_target = pytest.mark.parametrize("target", TARGETS)


class Stage:
    """A stage of the Dockerfile: its base, and its instructions as (word, rest)."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.instructions: list[tuple[str, str]] = []

    def last(self, word: str) -> str | None:
        """Return the last instruction of this kind, of the stage or of those that it is based on."""
        said = [rest for found, rest in self.instructions if found == word]
        above = STAGES.get(self.base)
        return said[-1] if said else above and above.last(word)


def read_dockerfile() -> dict[str, Stage]:
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, text.replace("\\\n", "").splitlines())):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.split()
            stages[name] = Stage(base)
        else:
            list(stages.values())[-1].instructions.append((word, rest))
    return stages


STAGES = read_dockerfile()


def copied_paths() -> set[str]:
    """Return what the Dockerfile copies from the repository."""
    copies = [rest.split() for stage in STAGES.values() for word, rest in stage.instructions if word == "COPY"]
    return {source for words in copies if not words[0].startswith("--from") for source in words[:-1]}


def is_ignored(path: str) -> bool:
    """Return whether Dockerfile.dockerignore excludes a path: the last pattern that matches decides."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    parents = [path, *map(str, Path(path).parents)][:-1]
    ignored = False
    for pattern in (line for line in lines if line and not line.startswith("#")):
        bare = pattern.removeprefix("!").removeprefix("**/")
        names = [Path(parent).name if "**/" in pattern else parent for parent in parents]
        if any(fnmatch(name, bare) for name in names):
            ignored = not pattern.startswith("!")
    return ignored


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for group in ALERTS["groups"] for rule in group["rules"])
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    yield from (annotation["expr"] for annotation in DASHBOARD["annotations"]["list"])


def names_in(expression: str) -> set[str]:
    """Return the metrics that an expression selects, histograms by their own name."""
    found = set(re.findall(r"([a-zA-Z_:][\w:]*)\s*[{\[]", expression)) | set(re.findall(r"\bpipeline_\w+", expression))
    return {name.removesuffix("_bucket") for name in found} - {"up"}


def third_party(files: set[Path]) -> dict[str, str]:
    """Return the third-party packages that modules import at the top, each with one module that does."""
    found: dict[str, str] = {}
    for file in (file for file in files if file.suffix == ".py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.partition(".")[0]: file.name for name in names}
    return {name: file for name, file in found.items() if name not in {*sys.stdlib_module_names, PACKAGE}}


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def requirements() -> set[str]:
    return {normalize(line) for line in lines_of(DEPLOY / "requirements.txt")}


def add_requirements(names: set[str]) -> set[str]:
    """Return distributions with those they require, as far as they are installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = normalize(waiting.pop())
        if name in found:
            continue
        found.add(name)
        with suppress(metadata.PackageNotFoundError):
            required = map(Requirement, metadata.requires(name) or [])
            waiting += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def packages_of(stage: str) -> set[str]:
    """Return the packages that a stage's own `pip install` names."""
    runs = [rest for word, rest in STAGES[stage].instructions if word == "RUN" and " install " in rest]
    words = [word for run in runs for word in run.partition(" install ")[2].split()]
    values = {value for option, value in pairwise(words) if option.startswith("--")}
    return {word for word in words if word not in values and not word.startswith("--")}


@pytest.fixture(scope="module")
def metrics(tiny_engine_folder: Path) -> set[str]:
    """The names of the server's metrics."""
    with running_server(tiny_engine_folder) as running:
        lines = requests.get(f"{running.url}/metrics", timeout=30).text.splitlines()
    return {line.split()[2] for line in lines if line.startswith("# TYPE ")}


def test_every_metric_in_use_is_one_of_the_servers(metrics: set[str]) -> None:
    found = {name: expression for expression in expressions() for name in names_in(expression)}
    assert {name: expression for name, expression in found.items() if name not in metrics} == {}


def test_the_dashboard_shows_every_metric(metrics: set[str]) -> None:
    shown = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert set().union(*map(names_in, shown)) == metrics


def test_every_outcome_in_use_is_one_of_the_servers() -> None:
    named = [group for expression in expressions() for group in re.findall(r'outcome=~?"([^"]+)"', expression)]
    assert named
    assert {outcome for group in named for outcome in group.split("|")} <= set(get_args(Outcome))


def test_the_dashboard_reads_the_data_source_that_is_provisioned() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = read_yaml(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    panels = DASHBOARD["panels"]
    parts = [*panels, *(target for panel in panels for target in panel["targets"]), *DASHBOARD["annotations"]["list"]]
    assert {part["datasource"]["uid"] for part in parts} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    (provider,) = read_yaml(provisioning / "dashboards" / "pipeline.yaml")["providers"]
    folders = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in folders


def test_prometheus_looks_for_the_server_where_compose_has_it() -> None:
    prometheus = read_yaml(DEPLOY / "prometheus.yaml")
    (job,) = prometheus["scrape_configs"]
    (place,) = job["dns_sd_configs"]
    assert set(place["names"]) <= set(COMPOSE["services"])
    assert f":{place['port']}" in str(COMPOSE["services"]["server"]["ports"])
    assert STAGES["cpu"].last("EXPOSE") == str(place["port"])
    assert all(f'job="{job["job_name"]}"' in expression for expression in expressions())
    assert all((DEPLOY / name).is_file() for name in prometheus["rule_files"])


@each_target
def test_an_image_runs_as_another_user_than_root(target: str) -> None:
    user = STAGES[target].last("USER")
    assert user is not None
    # A number: from a name, Kubernetes cannot tell whether it is root.
    assert int(user.split(":")[0]) > 0


@each_target
def test_an_image_says_how_it_is_started_stopped_and_watched(target: str) -> None:
    stage = STAGES[target]
    assert stage.last("STOPSIGNAL") == "SIGTERM"
    assert f"127.0.0.1:{stage.last('EXPOSE')}/health" in (stage.last("HEALTHCHECK") or "")
    assert json.loads(stage.last("ENTRYPOINT") or "") == (
        ["mlflow", "server"] if target == "mlflow" else ["python", "-m", "pipeline", "serve"]
    )
    assert json.loads(stage.last("CMD") or "") == ["--host", "0.0.0.0"]


def test_every_base_is_a_stage_or_an_exact_tag() -> None:
    bases = [stage.base for stage in STAGES.values() if stage.base not in STAGES]
    assert bases
    assert all(EXACT_TAG.fullmatch(base) for base in bases)


def test_what_the_dockerfile_copies_is_there_and_gets_in() -> None:
    assert copied_paths()
    assert [path for path in copied_paths() if not (ROOT / path).exists() or is_ignored(path)] == []
    served = [file.relative_to(ROOT).as_posix() for file in needed_files("pipeline.__main__", ROOT)]
    assert [path for path in served if is_ignored(path)] == []


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "data/a.txt", "deploy/.env", "mlflow.db", "out/export/engine", "tests"]
)
def test_what_an_image_does_not_need_is_ignored(path: str) -> None:
    assert is_ignored(path)


def test_copied_stages_are_there() -> None:
    origins = [
        rest.split()[0].removeprefix("--from=")
        for stage in STAGES.values()
        for word, rest in stage.instructions
        if word == "COPY" and rest.startswith("--from=")
    ]
    assert set(origins) == {f"install-{target}" for target in TARGETS}
    assert set(origins) <= set(STAGES)


@each_service
def test_a_service_listens_on_this_machine_alone(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["ports"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service.get("network_mode") is None


def test_the_override_opens_nothing() -> None:
    assert set(CUDA_COMPOSE["services"]["server"]) == {"build", "image", "command", "deploy"}
    base, override = (set(file["services"]["server"]["command"]) for file in (COMPOSE, CUDA_COMPOSE))
    assert base < override


@each_service
def test_a_service_can_do_little(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["deploy"]["resources"]["limits"]["memory"]


@each_service
def test_a_service_is_built_here_or_has_an_exact_tag(name: str) -> None:
    service = COMPOSE["services"][name]
    if "build" in service:
        assert service["build"]["target"] in TARGETS
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    else:
        assert EXACT_TAG.fullmatch(service["image"])


@each_service
def test_what_a_service_mounts_is_there(name: str) -> None:
    for source, target, *mode in (volume.split(":") for volume in COMPOSE["services"][name]["volumes"]):
        if source.startswith("."):
            assert (DEPLOY / source).exists()
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]
        assert target.startswith("/")


@each_service
def test_a_service_waits_for_healthy_services(name: str) -> None:
    for other, condition in COMPOSE["services"][name].get("depends_on", {}).items():
        service = COMPOSE["services"][other]
        assert condition == {"condition": "service_healthy"}
        assert "healthcheck" in service or STAGES[service["build"]["target"]].last("HEALTHCHECK")


@each_service
def test_a_service_keeps_what_it_writes_in_its_volume(name: str) -> None:
    service = COMPOSE["services"][name]
    if "build" in service:
        targets = [volume.split(":")[1] for volume in service["volumes"]]
        assert STAGES[service["build"]["target"]].last("VOLUME") in targets


def test_no_secret_is_written_down() -> None:
    named = {
        key: value
        for service in COMPOSE["services"].values()
        for key, value in service.get("environment", {}).items()
        if SECRET.search(key)
    }
    assert named
    # Required, without a default.
    assert all(re.fullmatch(r"\$\{\w+:?\?[^}]+\}", value) for value in named.values())
    example = dict(line.split("=", 1) for line in lines_of(DEPLOY / "example.env"))
    assert all(not value for key, value in example.items() if SECRET.search(key))
    assert "/deploy/.env" in lines_of(ROOT / ".gitignore")


def test_every_variable_of_the_example_is_read() -> None:
    read = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text(encoding="utf-8")))
    assert {line.partition("=")[0] for line in lines_of(DEPLOY / "example.env")} <= read


def test_the_model_of_the_parameters_is_served() -> None:
    uri = f"models:/{read_yaml(ROOT / PARAMS_FILE)['register']['name']}@champion"
    assert f"MODEL={uri}" in lines_of(DEPLOY / "example.env")
    for file in (COMPOSE, CUDA_COMPOSE):
        assert f"--model=${{MODEL:-{uri}}}" in file["services"]["server"]["command"]


def test_the_image_holds_what_the_server_imports() -> None:
    modules = [file for file in (ROOT / PACKAGE / "serving").glob("[!_]*.py") if file.name != RUN_BY_MLFLOW]
    names = ["pipeline.tracking.registry", *(f"pipeline.serving.{file.stem}" for file in modules)]
    imported = third_party(set().union(*(needed_files(name, ROOT) for name in names)))
    assert {"mlflow", "numpy", "onnxruntime", "tokenizers"} <= imported.keys()
    distributions = metadata.packages_distributions()
    for runtime in ("install-cpu", "install-cuda"):
        held = add_requirements(requirements() | packages_of(runtime))
        brought = {name: {normalize(one) for one in distributions.get(name, [name])} for name in imported}
        # Either wheel provides onnxruntime; the machine that runs this test has one of them.
        brought["onnxruntime"] = {"onnxruntime", "onnxruntime-gpu"}
        assert {name: imported[name] for name, one_of in brought.items() if not one_of & held} == {}


def test_the_image_holds_no_training() -> None:
    assert not add_requirements(requirements()) & {"torch", "transformers", "dvc", "mlflow", "onnx", "optimum"}


def test_exact_versions_are_those_of_the_constraints() -> None:
    pinned = {normalize(line.partition("==")[0]) for line in lines_of(ROOT / "constraints.txt")}
    named = requirements().union(*(packages_of(f"install-{target}") for target in TARGETS))
    assert {"mlflow", "onnxruntime", "onnxruntime-gpu"} <= named
    assert named <= pinned
    for stage in STAGES.values():
        runs = [rest for word, rest in stage.instructions if word == "RUN" and "/venv/bin/python install" in rest]
        assert all("--constraint constraints.txt" in run and "--no-cache-dir" in run for run in runs)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "deploy/prometheus.yaml"),
        ("check", "rules", "deploy/alerts.yaml"),
        ("test", "rules", "tests/deploy_alerts.yaml"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_prometheus_understands_it(arguments: Any) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run([promtool, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
