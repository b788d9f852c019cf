"""`engine.json`: what an engine folder holds, and the digest of every file in it. Nothing about decoding."""

from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file, write_json
from pipeline.tokens import TOKENIZER_FILE

FORMAT_VERSION = 3
MANIFEST_FILE = "engine.json"
GRAPH_FILE = "model.onnx"
INDEX_FOLDER = "verbatim"
"""Where an engine holds the index of its training text, if it does: `pipeline.engine.verbatim`."""
STATES = "states"
"""The output of a graph that is the last hidden state; those exported before it was there lack it."""
CUDA_PRECISIONS = ("float16", "int8_float16")
"""Those that run on CUDA: activations and cache in float16, and no list of the likeliest tokens, as the GPU draws."""
LISTED_TOKENS = 128
"""How many of the likeliest tokens the graph lists beside the logits: room for a top-k and what penalties change."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Shape and limits of the model, the precisions it is there in, and SHA-256 digests by relative path."""

    context_length: int
    vocabulary_size: int
    layers: int
    heads: int
    width: int
    end_of_text_id: int
    precisions: tuple[str, ...]
    """The first is the default; each is a folder that holds `GRAPH_FILE`."""
    cache_bits: dict[str, int]
    """Of a number in the cache, a precision."""
    files: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def holds_index(self) -> bool:
        return any(name.startswith(f"{INDEX_FOLDER}/") for name in self.files)


def listed_tokens(vocabulary_size: int) -> int:
    """How many tokens a row of the list holds: all of a small vocabulary."""
    return min(LISTED_TOKENS, vocabulary_size)


def write_manifest(
    folder: Path,
    *,
    context_length: int,
    vocabulary_size: int,
    layers: int,
    heads: int,
    width: int,
    end_of_text_id: int,
    precisions: tuple[str, ...],
    cache_bits: dict[str, int],
) -> None:
    """Describe the engine whose files stand in `folder`."""
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    manifest = Manifest(
        context_length=context_length,
        vocabulary_size=vocabulary_size,
        layers=layers,
        heads=heads,
        width=width,
        end_of_text_id=end_of_text_id,
        precisions=precisions,
        cache_bits=cache_bits,
        files=files,
    )
    write_json(folder / MANIFEST_FILE, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Raises `UserError` where `folder` holds no engine, or one of another format."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{folder}: holds no engine ({MANIFEST_FILE} is missing); `dvc repro export` makes one")
    try:
        values = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}; export the checkpoint again") from error
    if values.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {values.get('format_version')} is not the {FORMAT_VERSION} that this code reads; "
            "export the checkpoint again"
        )
    return Manifest(**{**values, "precisions": tuple(values["precisions"])})


def check_files(folder: Path, manifest: Manifest, precision: str) -> None:
    """Raises `UserError` where a file that this precision needs is missing or not what was exported."""
    for name, digest in manifest.files.items():
        if not name.startswith((f"{precision}/", f"{INDEX_FOLDER}/")) and name != TOKENIZER_FILE:
            continue
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is missing; export the checkpoint again")
        if sha256_file(path) != digest:
            raise UserError(f"{path}: its SHA-256 is not the one in {MANIFEST_FILE}; export the checkpoint again")
