"""Register the engine with its tokenizer, decoding, presets, parity and scores as one version of the model."""

import argparse
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

import pipeline
from pipeline.decoding import list_types, scalar_types
from pipeline.errors import report_errors
from pipeline.files import digest_of, read_json, write_json
from pipeline.imports import needed_files
from pipeline.params.file import load_section
from pipeline.params.register import RegisterParams
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.stage_process import stage_process
from pipeline.tracking import lineage, registry, runs, store
from pipeline.tracking.records import parent_run

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
            name=load_section("register", RegisterParams).name,
        )


def register(export: Path, evaluate: Path, finetune: Path, test: Path, out: Path, *, name: str) -> None:
    """Register the version that contains these files, unless the registry holds it, and write `version.json` to `out`.

    That file has the name and the fingerprint by which the version is found, but not its number, which depends on what
    else is in the registry: whoever runs a commit must get the same outputs.
    """
    details = read_json(evaluate / "details.json")
    score = registry.Score(
        test_split_sha256=registry.digest_texts(test),
        protocol=", ".join(f"{name} {details['protocol'][name]}" for name in PROTOCOL),
        bits_per_byte=details["documents"]["finetuned"]["bits_per_byte"],
    )
    client = store.connect()
    with tempfile.TemporaryDirectory() as folder:
        code = pack_code(Path(folder) / "pipeline")
        artifacts = {
            "engine": export / "engine",
            "decoding": evaluate / "decoding.json",
            "presets": evaluate / "presets.json",
            "parity": export / "parity.json",
            "scores": evaluate / "details.json",
        }
        fingerprint = digest_of([*artifacts.values(), code])
        version = registry.find_version(client, name, fingerprint)
        if version is not None:
            # The parameters went back to this version: its alias is decided again.
            alias = registry.set_alias(client, version, score)
            print(f"{name} version {version.version} already contains these files; it is {alias}")
        else:
            parent = parent_run(client, finetune, read_yaml(PARAMS_FILE))
            with runs.start_run("register", read_yaml(PARAMS_FILE), parent_run_id=parent) as run:
                version = registry.log_version(
                    run.run_id,
                    name,
                    model_file=code / "serving" / "pyfunc.py",
                    code_folder=code,
                    artifacts={key: str(path) for key, path in artifacts.items()},
                    signature=SIGNATURE,
                    model_config={"provider": "auto", "precision": "auto", "threads": None},
                    input_example=(["The lamp on Gull Rock"], {"max_new_tokens": 40, "seed": 7}),
                    requirements=requirements(),
                    tags={
                        **lineage.lineage(),
                        registry.RUN_TAG: parent,
                        **score.tags(),
                    },
                )
            alias = registry.set_alias(client, version, score)
            # Last: a version without its alias, because it was interrupted, is not found and made again.
            client.set_model_version_tag(name, version.version, registry.FINGERPRINT_TAG, fingerprint)
            print(f"registered {name} version {version.version} as {alias}")
    write_json(out / "version.json", {"name": name, "fingerprint": fingerprint})


def pack_code(folder: Path) -> Path:
    """Copy the modules of this package that the registered model imports, and no others, to `folder`."""
    root = Path(pipeline.__file__).parent.parent
    for file in needed_files(SERVED_MODULE, root):
        target = folder / file.relative_to(root / pipeline.__name__)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return folder


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
