"""The command line: `python -m pipeline COMMAND`."""

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from pipeline.decoding import ModelDecoding, SamplingParams, list_types, merge_decoding, read_decoding, scalar_types
from pipeline.errors import UserError, report_errors
from pipeline.files import read_json, size_of, temporary_folder
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.params.whole import load_params
from pipeline.serving.options import Access, Address, EngineOptions, Limits, keys_from_environment, read_tracing
from pipeline.tracking.pages import UI_PORT, is_server, runs_page, ui_url

OUT = Path("out")
LEXICON_COUNT = 2


def main(arguments: list[str] | None = None) -> None:
    parsed = build_parser().parse_args(arguments)
    with report_errors():
        parsed.run(parsed)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; what it parses has the function to call as `run`."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Commands that go with the pipeline of dvc.yaml. `dvc repro` runs the pipeline itself.",
        epilog=_examples("python -m pipeline generate 'The lamp'"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_serve(commands)
    _add_export(commands)
    _add_pack(commands)
    _add_restore(commands)
    _add_promote(commands)
    _add_ui(commands)
    _add_doctor(commands)
    _add_find_learning_rate(commands)
    _add_advise(commands)
    return parser


def _add_command(commands: Any, name: str, *, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, shutil.get_terminal_size().columns - 2),
        epilog=_examples(examples),
        # Only the examples need their line ends, but argparse has one setting for both texts.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Otherwise `--n 4`, as other programs have it, would be taken for --no-repeat-ngram-size.
        allow_abbrev=False,
    )
    return parser


def _examples(lines: str) -> str:
    return "example:\n" + textwrap.indent(textwrap.dedent(lines).strip(), "  ")


def _add_generate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "generate",
        summary="continue a text, or a file of prompts",
        description="Continue a text with the latest export or a registered model, and print it as it is generated; or "
        "continue every prompt of a file into another, in the same order. What a kill interrupts goes on when the "
        "command is given again (docs/scale.md). Options override the preset, which overrides the model's own "
        "decoding. A registered model has its own decoding and presets. The latest export uses "
        "out/evaluate/decoding.json and out/evaluate/presets.json if evaluate has written them. Otherwise, and for an "
        "engine folder (--model), the decoding is evaluate.decoding of params.yaml, and there are no presets.",
        examples="""
            python -m pipeline generate 'The lamp on Gull Rock' --max-new-tokens 60 --seed 7
            python -m pipeline generate 'The lamp' --model models:/harbour-tales@champion --preset faithful
            python -m pipeline generate --prompts prompts.jsonl --out texts.jsonl --seed 7
        """,
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; '' starts from nothing")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="continue the prompts of this file instead: a JSON object per line, with prompt and, if a row needs them, "
        "id, preset and decoding parameters of its own",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write for --prompts")
    parser.add_argument("--model", help="models:/NAME@ALIAS, models:/NAME/VERSION, or an engine folder")
    parser.add_argument("--preset", metavar="NAME", help="a preset of the model; other options override it")
    _add_placement(parser)
    parser.add_argument(
        "--slots",
        type=int,
        default=EngineOptions.slots,
        help="continuations to generate at once for --prompts (default: %(default)s)",
    )
    group = parser.add_argument_group("decoding parameters (explained in pipeline/decoding.py)")
    for name, kind in scalar_types().items():
        if name not in ("n", "logprobs", "ignore_eos"):
            group.add_argument(_option(name), type=kind, metavar="WORD" if kind is str else "NUMBER")
    for name, kind in list_types().items():
        group.add_argument(_option(name), type=kind, nargs="+", metavar=_metavar(name, kind))
    group.add_argument("--logit-bias", type=_bias, nargs="+", metavar="ID=BIAS")
    group.add_argument(_option("ignore_eos"), action="store_true", default=None)
    parser.set_defaults(run=_generate)


def _add_placement(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where an engine runs, on how many cores, and in which precision."""
    parser.add_argument("--provider", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="a precision that the engine has (default: its first)")
    parser.add_argument(
        "--threads",
        type=int,
        help="cores that one operator may use (default: all, or what the container's quota leaves)",
    )


def _generate(arguments: argparse.Namespace) -> None:
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UserError("prompt: give a text to continue, or --prompts FILE with --out FILE, and not both")
    if (arguments.prompts is None) != (arguments.out is None):
        raise UserError("--out: names the file to write for --prompts; give both or neither")
    folder, decoding = _engine_and_decoding(arguments.model)
    values = {name: value for name, value in vars(arguments).items() if name in SamplingParams.__dataclass_fields__}
    if arguments.logit_bias:
        values["logit_bias"] = dict(arguments.logit_bias)
    if arguments.prompts is None:
        _generate_one(arguments, folder, merge_decoding(decoding.preset(arguments.preset), values))
    else:
        _generate_many(arguments, folder, decoding, values)


def _generate_one(arguments: argparse.Namespace, folder: Path, params: SamplingParams) -> None:
    # Imported here, so that `--help` answers at once.
    from pipeline.engine.text import TextGenerator

    generator = TextGenerator.load(
        folder, precision=arguments.precision, provider=arguments.provider, threads=arguments.threads
    )
    # A prompt that does not fit raises here, before anything is printed.
    pieces = generator.stream(arguments.prompt, params)
    print(arguments.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _generate_many(
    arguments: argparse.Namespace, folder: Path, decoding: ModelDecoding, values: dict[str, Any]
) -> None:
    from pipeline.many_prompts import ManyPrompts, decoding_of_rows, generate_many

    of_rows = decoding_of_rows(decoding, arguments.preset, values)
    many = ManyPrompts(
        arguments.prompts,
        arguments.out,
        folder,
        of_rows,
        seed=of_rows.default.seed,
        precision=arguments.precision,
        provider=arguments.provider,
        threads=arguments.threads,
        slots=arguments.slots,
    )
    print(generate_many(many))


def _add_serve(commands: Any) -> None:
    parser = _add_command(
        commands,
        "serve",
        summary="serve a model over HTTP with OpenAI's API",
        description="Serve a registered model, or an engine folder. If --model names an alias, the server switches to "
        "the alias's new version without downtime. An engine folder is decoded with evaluate.decoding of params.yaml, "
        "without presets. The environment variable PIPELINE_API_KEYS lists the keys that clients may send, separated "
        "by commas. See docs/serving.md.",
        examples="""
            python -m pipeline serve
            python -m pipeline serve --model out/export/engine --precision int8 --port 8080
        """,
    )
    parser.add_argument(
        "--model",
        help="models:/NAME@ALIAS, models:/NAME/VERSION, or an engine folder (default: the champion of register.name)",
    )
    parser.add_argument(
        "--host", default=Address.host, help="address to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=Address.port, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--root-path",
        default=Address.root_path,
        metavar="PATH",
        help="the path under which a proxy shows the server, such as /llm (default: the root)",
    )
    _add_placement(parser)
    parser.add_argument(
        "--slots",
        type=int,
        default=EngineOptions.slots,
        help="continuations to generate at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=EngineOptions.max_queue,
        help="continuations that may wait (default: %(default)s)",
    )
    parser.add_argument(
        "--max-slots-per-client",
        type=int,
        metavar="SLOTS",
        help="slots that one key or address may hold, with the same share of the queue (default: all)",
    )
    parser.add_argument(
        "--max-tokens", type=int, help="the longest continuation that a request may ask for (default: as long as fits)"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=Limits.timeout_s,
        help="seconds that a request may take (default: %(default)g)",
    )
    parser.add_argument(
        "--cors-origin", nargs="+", default=[], metavar="URL", help="allow browser requests from these origins"
    )
    parser.add_argument("--open-metrics", action="store_true", help="show /metrics without a key")
    parser.add_argument(
        "--allowed-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="answer to these names, too, on a loopback address without keys, as behind a proxy",
    )
    parser.add_argument(
        "--mlflow-url",
        help="the MLflow page that the playground links to (default: the store if it is a server, else that of ui)",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="send a trace of each request to the MLflow server of the store, or to --mlflow-url if it is a database; "
        "OTEL_EXPORTER_OTLP_ENDPOINT sends them to a collector",
    )
    parser.add_argument("--trace-texts", action="store_true", help="show prompts and continuations in traces")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from pipeline.serving.server import serve
    from pipeline.tracking.store import store_errors, store_uri

    store = store_uri()
    mlflow_url = arguments.mlflow_url or ui_url(store)
    # A browser may know the server by another address than this machine.
    traces_url = store if is_server(store) else mlflow_url
    tracing = read_tracing(traces_url if arguments.trace else None, has_texts=arguments.trace_texts)
    model = arguments.model or f"models:/{load_params().register_.name}@champion"
    # A registered model brings its own decoding.
    decoding = None if _is_registered(model) else _decoding_of_folder(model)
    with store_errors():
        serve(
            model,
            decoding,
            address=Address(arguments.host, arguments.port, arguments.root_path),
            engine=EngineOptions(
                provider=arguments.provider,
                precision=arguments.precision,
                threads=arguments.threads,
                slots=arguments.slots,
                max_queue=arguments.max_queue,
                slots_per_client=arguments.max_slots_per_client,
            ),
            limits=Limits(max_tokens=arguments.max_tokens, timeout_s=arguments.timeout_s),
            access=Access(
                keys_from_environment(),
                tuple(arguments.cors_origin),
                arguments.open_metrics,
                tuple(arguments.allowed_host),
            ),
            mlflow_url=mlflow_url,
            tracing=tracing,
        )


def _engine_and_decoding(model: str | None) -> tuple[Path, ModelDecoding]:
    """Return what `--model` names; None is the latest export. Raises `UserError` if the registry does not hold it."""
    if model is None or not _is_registered(model):
        return Path(model or OUT / "export" / "engine"), _decoding_of_folder(model)
    from pipeline.tracking.registry import fetch_model
    from pipeline.tracking.store import connect, store_errors

    with store_errors():
        connect(create=False)
        return fetch_model(model)


def _decoding_of_folder(folder: str | None) -> ModelDecoding:
    """Return the decoding of an engine folder, or of the latest export if `folder` is None.

    Only for the latest export: what evaluate wrote, if it has run.
    """
    decoding, presets = (OUT / "evaluate" / name for name in ("decoding.json", "presets.json"))
    if folder is None and decoding.is_file() and presets.is_file():
        return read_decoding(decoding, presets)
    return ModelDecoding(load_params().evaluate.decoding)


def _is_registered(model: str) -> bool:
    """Return whether `--model` names a model of the registry, not a folder."""
    return model.startswith("models:")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _metavar(name: str, kind: type) -> str:
    """Return the placeholder for one value of a list option."""
    return "TEXT" if kind is str else "ID" if name.endswith("_ids") else "NUMBER"


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID=BIAS, got {text!r}") from None


def _add_export(commands: Any) -> None:
    parser = _add_command(
        commands,
        "export",
        summary="make an engine or a GGUF file of any GPT-2 checkpoint",
        description="Write the engine of a checkpoint folder, or a GGUF file for llama.cpp, Ollama and LM Studio. The "
        "folder has the layout of save_pretrained and includes the tokenizer. The export stage also makes the engine, "
        "and certifies it on your text. docs/elsewhere.md says how to use a GGUF file.",
        examples="""
            python -m pipeline export out/finetune/checkpoint my-engine --precision int8,float32
            python -m pipeline export out/finetune/checkpoint tales.gguf --format gguf --precision q8_0 \
              --compare out/tokenize/validation
        """,
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="folder, or NAME.gguf, to write; replaced if it exists")
    parser.add_argument(
        "--format",
        choices=["onnx", "gguf"],
        default="onnx",
        help="onnx is this project's engine (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        help="onnx: one or more of float32, float16, int8, int4, int8_float16, separated by commas (default: float32); "
        "gguf: one of f32, f16, q8_0, q4_0 (default: f32)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FOLDER",
        help="compare the distributions of each precision with PyTorch's on this text, and print the figures: a split "
        "that the tokenize stage wrote, such as out/tokenize/validation",
    )
    parser.add_argument(
        "--cache-bits",
        type=int,
        choices=[8, 32],
        help="onnx: bits per number in the KV cache of int8 and int4 (default: 8)",
    )
    parser.add_argument(
        "--verbatim-index",
        type=Path,
        metavar="FOLDER",
        help="onnx: index this text into the engine, so that max_verbatim_tokens and best_of work: a split that the "
        "tokenize stage wrote, such as out/tokenize/train (default: no index)",
    )
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    (_export_gguf if arguments.format == "gguf" else _export_engine)(arguments)


def _export_engine(arguments: argparse.Namespace) -> None:
    from pipeline.checkpoint import load_plain, plain_checkpoint
    from pipeline.engine.generator import Engine
    from pipeline.engine.manifest import INDEX_FOLDER
    from pipeline.export.build import CACHE_BITS, build_engine, check_precisions
    from pipeline.export.parity import engine_reader
    from pipeline.export.verbatim import write_index
    from pipeline.quality.lexicon import collect_words, load_lexicon
    from pipeline.tokens import load_tokenizer, load_tokens, tokenizer_sha256

    checkpoint, out, split = arguments.checkpoint, arguments.out, arguments.verbatim_index
    precisions = (arguments.precision or "float32").split(",")
    check_precisions(precisions)
    if out.suffix == ".gguf":
        raise UserError(f"{out}: is the name of a GGUF file; add --format gguf, or name a folder")
    index, lexicon = None, load_lexicon(checkpoint)
    with plain_checkpoint(checkpoint) as plain, temporary_folder(out, None) as temporary:
        texts = _texts_to_compare(arguments.compare, plain)
        model = load_plain(plain, str(checkpoint))
        if split is not None:
            text = load_tokens(split, tokenizer_sha256(plain))
            index = temporary / INDEX_FOLDER
            write_index(index, text.tokens, text.bounds)
            lexicon |= collect_words(text.texts(load_tokenizer(plain)))
        cache_bits = arguments.cache_bits or CACHE_BITS
        build_engine(model, plain, out, precisions, cache_bits=cache_bits, index=index, lexicon=lexicon)
    for precision in precisions:
        _print_size(out / precision)
    if texts is not None:
        engines = {precision: Engine.load(out, precision=precision, provider="cpu") for precision in precisions}
        _compare({precision: engine_reader(engine) for precision, engine in engines.items()}, model, texts)


def _export_gguf(arguments: argparse.Namespace) -> None:
    from pipeline.checkpoint import load_plain, plain_checkpoint
    from pipeline.export.gguf import check_target, read_gguf, read_license, write_gguf

    for option in ("cache_bits", "verbatim_index"):
        if getattr(arguments, option) is not None:
            raise UserError(f"{_option(option)}: belongs to an engine; leave it out with --format gguf")
    checkpoint, out, precision = arguments.checkpoint, arguments.out, arguments.precision or "f32"
    check_target(out, precision)
    with plain_checkpoint(checkpoint) as plain:
        texts = _texts_to_compare(arguments.compare, plain)
        model = load_plain(plain, str(checkpoint))
        write_gguf(model, plain, out, precision, license_id=read_license(checkpoint))
    _print_size(out)
    if texts is not None:
        from pipeline.export.reference import TorchReference

        _compare({precision: TorchReference(read_gguf(out, model.config)).logits}, model, texts)


def _print_size(path: Path) -> None:
    print(f"{path}: {size_of([path]) / 1e6:,.1f} MB")


def _texts_to_compare(split: Path | None, checkpoint: Path) -> list[list[int]] | None:
    """Return the texts of a split as a model reads them, or None without a split."""
    if split is None:
        return None
    from transformers import GPT2Config

    from pipeline.export.reference import windows_of
    from pipeline.tokens import load_tokens, tokenizer_sha256

    context_length = GPT2Config.from_pretrained(checkpoint).n_positions
    return list(windows_of(load_tokens(split, tokenizer_sha256(checkpoint)), context_length))


def _compare(readers: Any, model: Any, texts: list[list[int]]) -> None:
    """Print how close each precision is to the model in PyTorch."""
    from pipeline.export.parity import measure_closeness
    from pipeline.export.reference import TorchReference

    closeness = measure_closeness(readers, TorchReference(model).logits, texts, show_progress=sys.stderr.isatty())
    for precision, found in closeness.items():
        print(
            f"{precision}: the next token agrees with PyTorch's at {found.next_token_agreement:.3%} of "
            f"{found.positions:,} positions; KL divergence {found.kl_divergence:.2g} nats; perplexity "
            f"{found.perplexity:.4f} against {found.reference_perplexity:.4f}"
        )


def _add_pack(commands: Any) -> None:
    parser = _add_command(
        commands,
        "pack",
        summary="write a checkpoint in float16, to ship as a base",
        description="Write a checkpoint folder with its weights in float16. It is half the size, and base.source may "
        "name it. docs/base.md says how the bundled base was made.",
        examples="python -m pipeline pack out/finetune/checkpoint base --words-of out/prepare/train.jsonl",
    )
    parser.add_argument(
        "--words-of",
        type=Path,
        metavar="FILE",
        help=f"also write the words that these documents have at least {LEXICON_COUNT} times, by which samples are "
        "searched for invented ones (default: those of the checkpoint, if it has any)",
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="folder to write; replaced if it exists")
    parser.set_defaults(run=_pack)


def _pack(arguments: argparse.Namespace) -> None:
    from pipeline.checkpoint import WEIGHTS_FILE, pack_checkpoint
    from pipeline.files import read_jsonl
    from pipeline.quality.lexicon import collect_words, load_lexicon, write_lexicon

    lexicon = load_lexicon(arguments.checkpoint)
    if arguments.words_of is not None:
        lexicon |= collect_words((row["text"] for row in read_jsonl(arguments.words_of)), LEXICON_COUNT)
    pack_checkpoint(arguments.checkpoint, arguments.out)
    if lexicon:
        write_lexicon(arguments.out, lexicon)
    file = arguments.out / WEIGHTS_FILE
    print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")


def _add_restore(commands: Any) -> None:
    parser = _add_command(
        commands,
        "restore",
        summary="re-create runs and versions that are missing from MLflow",
        description="Record again the runs and the version that the tracking store lacks of the outputs in out/. Only "
        "register runs again.",
        examples="python -m pipeline restore",
    )
    parser.set_defaults(run=_restore)


def _restore(_: argparse.Namespace) -> None:
    from pipeline.tracking.restore import restore
    from pipeline.tracking.store import store_errors

    load_params()
    _read_version()
    with store_errors():
        restore(OUT, read_yaml(PARAMS_FILE))


def _read_version() -> Any:
    """Return the version that `register` noted. Raises `UserError` if it did not run."""
    file = OUT / "register" / "version.json"
    if not file.is_file():
        raise UserError(f"{file}: is missing; run `dvc repro` first")
    return read_json(file)


def _add_promote(commands: Any) -> None:
    parser = _add_command(
        commands,
        "promote",
        summary="make the version of this working tree the champion",
        description="Point the alias champion at the version that out/register/version.json names, whatever its score: "
        "after going back to an earlier commit, or for a version that cannot be compared with the champion.",
        examples="""
            git checkout COMMIT params.yaml dvc.lock && dvc checkout && dvc repro
            python -m pipeline promote
        """,
    )
    parser.set_defaults(run=_promote)


def _promote(_: argparse.Namespace) -> None:
    from pipeline.tracking.registry import promote
    from pipeline.tracking.store import connect, store_errors

    noted = _read_version()
    with store_errors():
        version = promote(connect(create=False), noted["name"], noted["fingerprint"])
    print(f"{version.name} version {version.version} is champion")


def _add_ui(commands: Any) -> None:
    parser = _add_command(
        commands,
        "ui",
        summary="browse the runs in MLflow",
        description="Show the tracking store in MLflow's UI: the embedded store, or that of MLFLOW_TRACKING_URI.",
        examples="python -m pipeline ui --port 5001",
    )
    parser.add_argument("--port", type=int, default=UI_PORT, help="port on 127.0.0.1 (default: %(default)s)")
    parser.set_defaults(run=_ui)


def _ui(arguments: argparse.Namespace) -> None:
    from pipeline.tracking.store import connect, experiment_id, without_password

    client = connect()
    uri, page = client.tracking_uri, runs_page(experiment_id(client))
    if is_server(uri):
        print(f"the store is a server with its own UI; the runs are at {without_password(ui_url(uri))}/{page}")
        return
    print(f"the runs are at http://127.0.0.1:{arguments.port}/{page}", flush=True)
    # The program next to this Python, which need not be on the path. connect() has created the store by now: two
    # processes that create it at once would collide.
    mlflow = Path(sys.executable).with_name("mlflow")
    # Not as an argument: a database's URI may hold a password, and every user of the machine sees arguments.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    os.execv(mlflow, [str(mlflow), "ui", "--port", str(arguments.port)])


def _add_doctor(commands: Any) -> None:
    parser = _add_command(
        commands,
        "doctor",
        summary="show what this machine can run, and what is missing",
        description="Show this machine's hardware and libraries, which providers of ONNX Runtime start here, what CUDA "
        "is missing and how to install it, and where an engine would run.",
        examples="python -m pipeline doctor",
    )
    parser.add_argument(
        "--engine",
        type=Path,
        default=OUT / "export" / "engine",
        metavar="FOLDER",
        help="the engine to look at (default: %(default)s)",
    )
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from pipeline.doctor import report

    print(report(arguments.engine))


def _add_find_learning_rate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "find-learning-rate",
        summary="suggest finetune.learning_rate by a short test",
        description="Train the base for some steps while the learning rate rises, and suggest the rate at which the "
        "loss has completed three quarters of its fall. Reads out/tokenize and out/base, which `dvc repro tokenize` "
        "makes, and the finetune section of params.yaml. Writes only out/learning-rate/.",
        examples="""
            dvc repro tokenize
            python -m pipeline find-learning-rate --steps 200
        """,
    )
    parser.add_argument(
        "--lowest", type=float, default=1e-6, metavar="RATE", help="the first rate (default: %(default)s)"
    )
    parser.add_argument(
        "--highest", type=float, default=1e-1, metavar="RATE", help="the last rate (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=100, metavar="NUMBER", help="optimizer steps to train (default: %(default)s)"
    )
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
    parser = _add_command(
        commands,
        "advise",
        summary="say whether more data, more epochs or neither helps",
        description="Fine-tune on shares of the training documents and on all of them, fit the learning curve, and say "
        "what to do next. Each share is a DVC experiment named advise-SHARE, which leaves the workspace alone; what "
        "DVC's cache holds is not run again. Writes out/advise/.",
        examples="python -m pipeline advise --shares 0.25 0.5",
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="shares of the documents, besides all of them (default: 0.125 0.25 0.5)",
    )
    parser.set_defaults(run=_advise)


def _advise(arguments: argparse.Namespace) -> None:
    from pipeline.advice.advise import SHARES, run_advise
    from pipeline.advice.experiments import check_place

    check_place()
    print(run_advise(OUT / "advise", arguments.shares or SHARES, load_params().finetune.evaluations))


if __name__ == "__main__":
    main()
