"""The command line: `python -m pipeline COMMAND`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.decoding import ModelDecoding, SamplingParams, list_types, read_decoding, scalar_types
from pipeline.errors import UserError, report_errors
from pipeline.params.file import PARAMS_FILE, read_yaml
from pipeline.params.whole import load_params

OUT = Path("out")
UI_PORT = 5000


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Commands around the pipeline of dvc.yaml.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_serve(commands)
    _add_export(commands)
    _add_pack(commands)
    _add_restore(commands)
    _add_ui(commands)
    _add_doctor(commands)
    _add_find_learning_rate(commands)
    _add_advise(commands)
    parsed = parser.parse_args(arguments)
    with report_errors():
        parsed.run(parsed)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text with the latest export, or with a registered model, as it is drawn. "
        "What is not set is the preset's, or else the model's own decoding. A registered model brings both. With the "
        "latest export they are those of out/evaluate/decoding.json and out/evaluate/presets.json, where evaluate has "
        "written them; else, and with a folder given by --model, the decoding is evaluate.decoding of params.yaml, and "
        "there are no presets.",
    )
    parser.add_argument("prompt", help="the beginning; '' starts from nothing")
    parser.add_argument("--model", help="models:/NAME@champion, models:/NAME/VERSION, or an engine folder")
    parser.add_argument("--preset", metavar="NAME", help="a preset of the model; options that are set beside it win")
    parser.add_argument("--provider", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="one that the engine holds (default: its first)")
    group = parser.add_argument_group("decoding parameters (pipeline/decoding.py tells what each does)")
    for name, kind in scalar_types().items():
        if name not in ("n", "logprobs", "ignore_eos"):
            group.add_argument(_option(name), type=kind, metavar="WORD" if kind is str else "NUMBER")
    for name, kind in list_types().items():
        group.add_argument(_option(name), type=kind, nargs="+", metavar=_metavar(name, kind))
    group.add_argument("--logit-bias", type=_bias, nargs="+", metavar="ID=BIAS")
    group.add_argument(_option("ignore_eos"), action="store_true", default=None)
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    # Imported here, so that `--help` is there at once.
    from pipeline.engine.text import TextGenerator, merge_decoding

    folder, decoding = _engine_and_decoding(arguments.model)
    values = {name: value for name, value in vars(arguments).items() if name in SamplingParams.__dataclass_fields__}
    if arguments.logit_bias:
        values["logit_bias"] = dict(arguments.logit_bias)
    params = merge_decoding(decoding.named(arguments.preset), values)
    generator = TextGenerator.load(folder, precision=arguments.precision, provider=arguments.provider)
    # Before anything is shown: a prompt that does not fit is refused here.
    pieces = generator.stream(arguments.prompt, params)
    print(arguments.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, as OpenAI's API does",
        description="Serve a registered model, whose alias is watched, or an engine folder, whose decoding is "
        "evaluate.decoding of params.yaml, without presets. Keys that clients must have stand in the environment "
        "variable PIPELINE_API_KEYS, parted by commas. docs/serving.md tells more.",
    )
    parser.add_argument(
        "--model",
        help="models:/NAME@ALIAS, models:/NAME/VERSION, or an engine folder (default: the champion of register.name)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, which only this machine reaches")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--provider", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="one that the engine holds (default: its first)")
    parser.add_argument("--threads", type=int, help="cores that an operator may use (default: all)")
    parser.add_argument("--slots", type=int, default=8, help="continuations at once (default: %(default)s)")
    parser.add_argument("--max-queue", type=int, default=64, help="continuations that may wait (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="of a continuation at most (default: what the context holds)")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of a request (default: %(default)g)")
    parser.add_argument("--cors-origin", nargs="+", default=[], metavar="URL", help="of pages that may ask")
    parser.add_argument("--open-metrics", action="store_true", help="show /metrics without a key")
    parser.add_argument(
        "--mlflow-url", help="where MLflow shows the runs, for links (default: the store, if a server, or that of ui)"
    )
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from pipeline.serving.server import serve
    from pipeline.tracking.store import store_errors, store_uri

    store = store_uri()
    ui_url = store if _is_server(store) else f"http://127.0.0.1:{UI_PORT}"
    model = arguments.model or f"models:/{load_params().register_.name}@champion"
    # A registered model brings its own decoding.
    decoding = ModelDecoding(SamplingParams()) if model.startswith("models:") else _decoding_of_folder(model)
    with store_errors():
        serve(
            model,
            decoding,
            host=arguments.host,
            port=arguments.port,
            provider=arguments.provider,
            precision=arguments.precision,
            threads=arguments.threads,
            slots=arguments.slots,
            max_queue=arguments.max_queue,
            max_tokens=arguments.max_tokens,
            timeout_s=arguments.timeout_s,
            origins=tuple(arguments.cors_origin),
            open_metrics=arguments.open_metrics,
            mlflow_url=arguments.mlflow_url or ui_url,
        )


def _engine_and_decoding(model: str | None) -> tuple[Path, ModelDecoding]:
    if model is None or not model.startswith("models:"):
        return Path(model or OUT / "export" / "engine"), _decoding_of_folder(model)
    from pipeline.tracking.registry import fetch_model
    from pipeline.tracking.store import connect, store_errors

    with store_errors():
        connect(create=False)
        return fetch_model(model)


def _decoding_of_folder(folder: str | None) -> ModelDecoding:
    """That of an engine folder; none is the latest export, of which evaluate may have said more."""
    decoding, presets = (OUT / "evaluate" / name for name in ("decoding.json", "presets.json"))
    if folder is None and decoding.is_file() and presets.is_file():
        return read_decoding(decoding, presets)
    return ModelDecoding(load_params().evaluate.decoding)


def _is_server(store: str) -> bool:
    """Whether a tracking store is a server of MLflow, which shows its runs itself."""
    return store.startswith(("http://", "https://"))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _metavar(name: str, kind: type) -> str:
    """What an entry of a list is called."""
    return "TEXT" if kind is str else "ID" if name.endswith("_ids") else "NUMBER"


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID=BIAS, got {text!r}") from None


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="make an engine of any GPT-2 checkpoint",
        description="Write the engine of a checkpoint folder, as save_pretrained writes it, with its tokenizer. "
        "The export stage does the same, and compares the engine with PyTorch on your text.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="folder of the engine; one that is there is replaced")
    parser.add_argument(
        "--precision",
        default="float32",
        help="float32, float16, int8, int4, int8_float16, joined by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-bits",
        type=int,
        choices=[8, 32],
        default=8,
        help="of a number in the KV cache of int8 and int4 (default: %(default)s)",
    )
    parser.add_argument(
        "--verbatim-index",
        type=Path,
        metavar="FOLDER",
        help="a split as the tokenize stage writes it, such as out/tokenize/train: the engine then holds that text, "
        "and max_verbatim_tokens can be asked for (default: none)",
    )
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from pipeline.checkpoint import load_checkpoint
    from pipeline.engine.verbatim import index_text
    from pipeline.export.build import build_engine, check_precisions
    from pipeline.tokens import load_tokens, tokenizer_sha256

    precisions = arguments.precision.split(",")
    check_precisions(precisions)
    checkpoint, split = arguments.checkpoint, arguments.verbatim_index
    model = load_checkpoint(checkpoint)
    index = None if split is None else index_text(load_tokens(split, tokenizer_sha256(checkpoint)).tokens)
    build_engine(model, checkpoint, arguments.out, precisions, cache_bits=arguments.cache_bits, index=index)
    for precision in precisions:
        size = sum(file.stat().st_size for file in (arguments.out / precision).iterdir())
        print(f"{arguments.out / precision}: {size / 1e6:,.1f} MB")


def _add_pack(commands: Any) -> None:
    parser = commands.add_parser(
        "pack",
        help="write a checkpoint in float16, as a base to be shipped",
        description="Write a checkpoint folder with its weights in float16: half of the size, and what base.source "
        "may name. docs/base.md tells how the bundled base was made.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="folder of the base; one that is there is replaced")
    parser.set_defaults(run=_pack)


def _pack(arguments: argparse.Namespace) -> None:
    from pipeline.checkpoint import WEIGHTS_FILE, pack_checkpoint

    pack_checkpoint(arguments.checkpoint, arguments.out)
    file = arguments.out / WEIGHTS_FILE
    print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")


def _add_restore(commands: Any) -> None:
    parser = commands.add_parser(
        "restore",
        help="make anew what the tracking store no longer holds",
        description="Check that the tracking store holds the runs and the version that out/ names, "
        "and run the stages again whose records are gone.",
    )
    parser.set_defaults(run=_restore)


def _restore(_: argparse.Namespace) -> None:
    from pipeline.tracking.restore import restore
    from pipeline.tracking.store import store_errors

    load_params()
    if not (OUT / "register" / "version.json").is_file():
        raise UserError(f"{OUT / 'register' / 'version.json'}: is missing; run `dvc repro` first")
    with store_errors():
        restore(OUT, read_yaml(PARAMS_FILE))


def _add_ui(commands: Any) -> None:
    parser = commands.add_parser(
        "ui",
        help="browse the runs in MLflow",
        description="Show the tracking store, the embedded one or that of MLFLOW_TRACKING_URI, in MLflow's UI.",
    )
    parser.add_argument("--port", type=int, default=UI_PORT, help="on 127.0.0.1 (default: %(default)s)")
    parser.set_defaults(run=_ui)


def _ui(arguments: argparse.Namespace) -> None:
    from pipeline.tracking.store import connect, without_password

    uri = connect().tracking_uri
    if _is_server(uri):
        print(f"{without_password(uri)} is a server, and shows its runs itself: open it in a browser")
        return
    # Beside this Python, which need not be on the path. The store is there by now: two that make it would collide.
    mlflow = Path(sys.executable).with_name("mlflow")
    os.execv(mlflow, [str(mlflow), "ui", "--backend-store-uri", uri, "--port", str(arguments.port)])


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what this machine can run, and what it lacks",
        description="Say what this machine is, which providers of ONNX Runtime truly start on it, what CUDA lacks and "
        "how to bring it, and where an engine would run.",
    )
    parser.add_argument("--engine", type=Path, default=OUT / "export" / "engine", help="default: %(default)s")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from pipeline.doctor import report

    print(report(arguments.engine))


def _add_find_learning_rate(commands: Any) -> None:
    parser = commands.add_parser(
        "find-learning-rate",
        help="suggest finetune.learning_rate by a short test",
        description="Train the base for some steps at a learning rate that rises from one to the next, and suggest the "
        "rate by which the loss has done three quarters of its fall. Reads out/tokenize and out/base, as "
        "`dvc repro tokenize` leaves them, and the finetune section of params.yaml; writes out/learning-rate/ and "
        "nothing else.",
    )
    parser.add_argument("--lowest", type=float, default=1e-6, metavar="RATE", help="default: %(default)s")
    parser.add_argument("--highest", type=float, default=1e-1, metavar="RATE", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.set_defaults(run=_find_learning_rate)


def _find_learning_rate(arguments: argparse.Namespace) -> None:
    from pipeline.advice.learning_rate import find_learning_rate

    found = find_learning_rate(
        OUT / "tokenize",
        OUT / "base",
        OUT / "learning-rate",
        load_params().finetune,
        lowest=arguments.lowest,
        highest=arguments.highest,
        steps=arguments.steps,
    )
    print(found)


def _add_advise(commands: Any) -> None:
    parser = commands.add_parser(
        "advise",
        help="say whether more data, more epochs or neither helps",
        description="Fine-tune on shares of the training documents and on all of them, each as a DVC experiment named "
        "advise-SHARE that leaves the workspace alone, fit the learning curve, and say what to do next. Writes "
        "out/advise/. What is in DVC's cache is not run again.",
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="SHARE", help="default: 0.125 0.25 0.5; all of them is always there"
    )
    parser.set_defaults(run=_advise)


def _advise(arguments: argparse.Namespace) -> None:
    from pipeline.advice.advise import SHARES, run_advise
    from pipeline.advice.experiments import check_place

    check_place()
    print(run_advise(OUT / "advise", arguments.shares or SHARES, load_params().finetune.evaluations))


if __name__ == "__main__":
    main()
