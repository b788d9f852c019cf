"""Register the engine with its tokenizer, decoding, presets, parity and scores as one version of the model."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

import pipeline
from pipeline.decoding import list_types, scalar_types
from pipeline.errors import report_errors
from pipeline.files import digest_of, read_json, size_of, write_json
from pipeline.imports import PACKAGE, needed_files, rename_package
from pipeline.params.file import load_section
from pipeline.params.register import RegisterParams
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.stage_process import stage_process
from pipeline.tracking import lineage, pages, registry, runs, store
from pipeline.tracking.card import read_card, render_card
from pipeline.tracking.notes import how_to_make_again
from pipeline.tracking.records import parent_run
from pipeline.tracking.tags import FINGERPRINT_TAG
from pipeline.tracking.versions import links_of_version, note_registration, record_model

SERVED_MODULE = "pipeline.serving.pyfunc"
PROTOCOL = ("provider", "precision", "window_tokens", "stride_tokens")
"""What bits per byte depend on besides model and texts."""
COLUMNS = {bool: DataType.boolean, int: DataType.long, float: DataType.double, str: DataType.string}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string)]),
    outputs=Schema([ColSpec(DataType.string)]),
    params=ParamSchema(
        [
            ParamSpec("preset", DataType.string, None),
            # `predict` returns texts, which have no place for log-probabilities.
            *(ParamSpec(name, COLUMNS[kind], None) for name, kind in scalar_types().items() if name != "logprobs"),
            *(ParamSpec(name, COLUMNS[kind], [], shape=(-1,)) for name, kind in list_types().items()),
            ParamSpec("logit_bias_ids", DataType.long, [], shape=(-1,)),
            ParamSpec("logit_bias_values", DataType.double, [], shape=(-1,)),
        ]
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of the export stage")
    parser.add_argument("evaluate", type=Path, help="folder of the evaluate stage")
    parser.add_argument("finetune", type=Path, help="folder of the finetune stage")
    parser.add_argument("test", type=Path, help="the test split's documents")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with report_errors(), store.store_errors(), stage_process(arguments.out):
        register(
            arguments.export,
            arguments.evaluate,
            arguments.finetune,
            arguments.test,
            arguments.out,
            load_section("register", RegisterParams),
        )


def register(export: Path, evaluate: Path, finetune: Path, test: Path, out: Path, params: RegisterParams) -> None:
    """Register the version that contains these files, unless the registry holds it, and write `version.json` to `out`.

    That file has the name and the fingerprint by which the version is found, but not its number, which depends on what
    else is in the registry: whoever runs a commit must get the same outputs.
    """
    name, details = params.name, read_json(evaluate / "details.json")
    score = registry.Score(
        test_split_sha256=lineage.digest_texts(test),
        protocol=", ".join(f"{name} {details['protocol'][name]}" for name in PROTOCOL),
        bits_per_byte=details["documents"]["finetuned"]["bits_per_byte"],
    )
    client = store.connect()
    with packed_code() as code:
        artifacts = {
            "engine": export / "engine",
            "decoding": evaluate / "decoding.json",
            "presets": evaluate / "presets.json",
            "parity": export / "parity.json",
            "scores": evaluate / "details.json",
        }
        fingerprint = digest_of([*artifacts.values(), code])
        parameters = read_yaml(PARAMS_FILE)
        version = registry.find_version(client, name, fingerprint)
        if version is not None:
            # The parameters went back to this version: its alias is decided again, and its card may have changed.
            run = runs.RunLog(client, str(version.run_id))
            done = f"{name} version {version.version} already contains these files; it is"
        else:
            parent = parent_run(client, finetune, parameters)
            # Minutes at a server on a slow line.
            print(f"storing {size_of(artifacts.values()) / 1e6:,.1f} MB as a version of {name}", flush=True)
            with runs.start_run("register", parameters, parent_run_id=parent) as run:
                version, model_id = registry.log_version(
                    run.run_id,
                    name,
                    model_file=code / "serving" / "pyfunc.py",
                    code_folder=code,
                    artifacts={key: str(path) for key, path in artifacts.items()},
                    signature=SIGNATURE,
                    model_config={"provider": "auto", "precision": "auto", "threads": None},
                    input_example=(["The lamp on Gull Rock"], {"max_new_tokens": 40, "seed": 7}),
                    requirements=requirements(),
                    params=lineage.flatten({"decoding": read_json(evaluate / "decoding.json")}),
                    tags={**lineage.select_short(run.tags()), registry.RUN_TAG: parent, **score.tags()},
                )
                record_model(run, model_id, evaluate, export, score.test_split_sha256)
            done = f"registered {name} version {version.version} as"
    alias = registry.set_alias(client, version, score)
    # A version without its alias, because it was interrupted, is not found and is made again.
    client.set_model_version_tag(name, version.version, FINGERPRINT_TAG, fingerprint)
    # Somebody may have deleted the run of an old version.
    if runs.holds_run(run.run_id):
        again, links = how_to_make_again(run.tags()), links_of_version(run, evaluate)
        card = read_card(params, version.version, parameters, export, evaluate, again=again, links=links)
        registry.set_card(client, version, render_card(card))
        note_registration(run, version)
    print(f"{done} {alias}")
    print(pages.where_to_look(store.store_uri(), store.experiment_id(client), name, version.version))
    write_json(out / "version.json", {"name": name, "fingerprint": fingerprint})


@contextmanager
def packed_code() -> Iterator[Path]:
    """Yield a package with the modules that the registered model imports, and no others.

    Its name contains a digest of its files, so that one process can import those of several versions, and this one.
    MLflow runs a model when it logs it: the package can be imported until the block ends.
    """
    root = Path(pipeline.__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PACKAGE
        for file in needed_files(SERVED_MODULE, root):
            target = copy / file.relative_to(root / PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        package = copy.rename(copy.with_name(f"{PACKAGE}_{digest_of([copy])[:12]}"))
        for file in package.rglob("*.py"):
            file.write_bytes(rename_package(file.read_bytes(), package.name))
        sys.path.insert(0, folder)
        try:
            yield package
        finally:
            sys.path.remove(folder)
            for name in [name for name in sys.modules if name.split(".")[0] == package.name]:
                del sys.modules[name]


def requirements() -> list[str]:
    """Return the packages that loading the model needs, in the versions installed here."""
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    runtime = installed.get("onnxruntime-gpu") or installed["onnxruntime"]
    return [
        f"mlflow=={installed['mlflow']}",
        f"numpy=={installed['numpy']}",
        f"tokenizers=={installed['tokenizers']}",
        f"onnxruntime-gpu=={runtime}; sys_platform != 'darwin'",
        f"onnxruntime=={runtime}; sys_platform == 'darwin'",
    ]


if __name__ == "__main__":
    main()
