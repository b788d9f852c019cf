"""What dvc.yaml says is what the code does: dependencies, outputs, parameters."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from dag import DAG, ROOT, STAGES, arguments, outs
from dvc.api import artifacts_show

from pipeline.imports import needed_files
from pipeline.params.section import Section, read_yaml
from pipeline.params.whole import Params
from pipeline.stages.register import SERVED_MODULE

PARAMS = read_yaml(ROOT / "params.yaml")
SHARED_SECTIONS = {"samples": ("tune", "evaluate")}
"""Sections of params.yaml that belong to several stages."""
NAMED_BY_PARAMETERS = {"base": [PARAMS["base"]["source"]]}
"""What a stage reads because a parameter says so."""
SERVED_LIBRARIES = {"mlflow", "numpy", "onnxruntime", "pandas", "tokenizers"}
LIGHT = (
    *("pipeline.decoding", "pipeline.params.whole", "pipeline.engine.filters", "pipeline.curves"),
    *(
        f"pipeline.{folder}.{file.stem}"
        for folder in ("corpus", "quality")
        for file in sorted((ROOT / "pipeline" / folder).glob("[!_]*.py"))
    ),
)
TORCHLESS = (
    "pipeline.engine",
    "pipeline.engine.text",
    "pipeline.stages.evaluate",
    "pipeline.stages.register",
    "pipeline.stages.tune",
)

IMPORT_WITHOUT = """
import importlib, sys

blocked, modules = (argument.split(",") for argument in sys.argv[1:])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for module in modules:
    importlib.import_module(module)
"""

each_stage = pytest.mark.parametrize("stage", STAGES)


def covers(path: str, other: str) -> bool:
    """Whether `other` is `path` or lies in it."""
    return PurePosixPath(other).is_relative_to(path)


def needed(stage: str) -> set[Path]:
    files = needed_files(f"pipeline.stages.{stage}", ROOT)
    # register packs what the served model imports.
    return files | needed_files(SERVED_MODULE, ROOT) if stage == "register" else files


def parsed(file: Path) -> ast.Module:
    """The source of a module; nothing of a file that is none."""
    return ast.parse(file.read_text(encoding="utf-8") if file.suffix == ".py" else "")


def has_code(file: Path) -> bool:
    """Whether a module holds more than its docstring; a file that is none does."""
    if file.suffix != ".py":
        return True
    body = parsed(file).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def top_level_imports(file: Path) -> set[str]:
    """The packages that importing the file itself imports."""
    names: list[str] = []
    for node in parsed(file).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


def attributes_read(files: set[Path]) -> set[str]:
    return {
        node.attr
        for file in files
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def fields_of(section: type[Section]) -> list[str]:
    """Names of the fields that hold values, those of nested sections included."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            names += fields_of(annotation)
        else:
            names.append(name)
    return names


@each_stage
def test_a_stage_is_its_module_and_its_folder(stage: str) -> None:
    assert STAGES[stage]["cmd"].startswith(f"python -m pipeline.stages.{stage} ")
    assert (ROOT / "pipeline" / "stages" / f"{stage}.py").is_file()
    assert arguments(stage)[-1] == f"out/{stage}"
    assert all(covers(f"out/{stage}", path) for path in outs(stage))


def test_every_stage_module_is_a_stage() -> None:
    modules = {file.stem for file in (ROOT / "pipeline" / "stages").glob("*.py")}
    assert modules - {"__init__"} == set(STAGES)


@each_stage
def test_every_module_that_a_stage_needs_is_a_dependency(stage: str) -> None:
    files = {file.relative_to(ROOT).as_posix() for file in needed(stage) if has_code(file)}
    listed = [path for path in STAGES[stage]["deps"] if covers("pipeline", path)]
    assert {file for file in files if not any(covers(path, file) for path in listed)} == set()


@each_stage
def test_no_module_is_a_dependency_without_need(stage: str) -> None:
    files = {file.relative_to(ROOT).as_posix() for file in needed(stage)}
    listed = [path for path in STAGES[stage]["deps"] if covers("pipeline", path)]
    assert [path for path in listed if not any(covers(path, file) for file in files)] == []


@each_stage
def test_what_a_stage_reads_of_others_is_a_dependency(stage: str) -> None:
    others = {path for other in STAGES if other != stage for path in outs(other)}
    deps = STAGES[stage]["deps"]
    for argument in arguments(stage)[:-1]:
        made = {path for path in others if covers(argument, path) or covers(path, argument)}
        assert made or (ROOT / f"{argument}.dvc").is_file(), f"{argument} is made by no stage"
        assert any(covers(argument, dep) or covers(dep, argument) for dep in deps), f"{argument} is no dependency"


@each_stage
def test_every_dependency_is_an_argument_or_a_module(stage: str) -> None:
    read = [*arguments(stage)[:-1], *NAMED_BY_PARAMETERS.get(stage, [])]
    for dep in STAGES[stage]["deps"]:
        assert covers("pipeline", dep) or any(covers(path, dep) for path in read), dep


@each_stage
def test_what_a_parameter_names_is_bundled_and_a_dependency(stage: str) -> None:
    for path in NAMED_BY_PARAMETERS.get(stage, []):
        assert path in STAGES[stage]["deps"]
        assert (ROOT / f"{path}.dvc").is_file()


@each_stage
def test_parameters_belong_to_the_stage(stage: str) -> None:
    listed = STAGES[stage].get("params", [])
    shared = [section for section, stages in SHARED_SECTIONS.items() if stage in stages]
    assert sorted(listed) == sorted([*([stage] if stage in PARAMS else []), *shared])


@pytest.mark.parametrize("stage", PARAMS)
def test_every_parameter_is_read_by_its_stage(stage: str) -> None:
    sections = {field.alias or name: field.annotation for name, field in Params.model_fields.items()}
    section = sections[stage]
    assert isinstance(section, type)
    assert issubclass(section, Section)
    for reader in SHARED_SECTIONS.get(stage, (stage,)):
        files = needed_files(f"pipeline.stages.{reader}", ROOT)
        read = attributes_read({file for file in files if file.parent.name != "params"})
        assert set(fields_of(section)) - read == set()


def test_every_section_belongs_to_a_stage() -> None:
    assert set(PARAMS) <= {*STAGES, *SHARED_SECTIONS}


def test_every_plot_and_metric_is_in_a_stage_output() -> None:
    files = {file for plot in DAG["plots"] for settings in plot.values() for file in settings["y"]}
    written = [path for stage in STAGES for path in outs(stage)]
    assert [file for file in (*files, *DAG["metrics"]) if not any(covers(path, file) for path in written)] == []


def test_every_artifact_is_in_a_stage_output() -> None:
    written = [path for stage in STAGES for path in outs(stage)]
    paths = [artifact["path"] for artifact in DAG["artifacts"].values()]
    assert [path for path in paths if not any(covers(out, path) for out in written)] == []


def test_dvc_finds_the_model_of_a_tag(tmp_path: Path) -> None:
    ((name, artifact),) = DAG["artifacts"].items()
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    # The tag that `gto register` makes.
    for command in (
        ["init", "--quiet"],
        ["add", "."],
        ["commit", "--quiet", "-m", "x"],
        ["tag", "--message=x", f"{name}@v1.0.0"],
    ):
        subprocess.run([*git, *command], check=True)
    assert artifacts_show(name, repo=str(tmp_path))["path"] == artifact["path"]


def test_no_stage_output_is_in_git() -> None:
    tracked = subprocess.run(["git", "ls-files", "--", "out"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tracked.stdout == ""


def test_rules_need_neither_torch_nor_mlflow() -> None:
    import_without("torch,transformers,mlflow", LIGHT)


def test_decoding_needs_no_torch() -> None:
    import_without("torch,transformers,optimum,onnx", TORCHLESS)


def import_without(blocked: str, modules: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", IMPORT_WITHOUT, blocked, ",".join(modules)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_served_model_needs_few_libraries() -> None:
    files = needed_files(SERVED_MODULE, ROOT)
    libraries = set().union(*map(top_level_imports, files)) - sys.stdlib_module_names - {"pipeline"}
    assert libraries <= SERVED_LIBRARIES
