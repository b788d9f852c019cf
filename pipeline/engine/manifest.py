"""`engine.json`: what an engine folder holds, and the digest of each file in it. Nothing about decoding."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file, size_of, write_json
from pipeline.quality.lexicon import LEXICON_FILE
from pipeline.tokens import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

FORMAT_VERSION = 3
MANIFEST_FILE = "engine.json"
GRAPH_FILE = "model.onnx"
INDEX_FOLDER = "verbatim"
"""The folder of the index of the training text, if the engine has one: `pipeline.engine.verbatim`."""
READ_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, LEXICON_FILE)
"""The files that every precision needs."""
STATES = "states"
"""The graph's output for the last hidden state. Graphs of older exports lack it."""
CUDA_PRECISIONS = ("float16", "int8_float16")
"""The precisions for CUDA: activations and cache in float16, and no list of the likeliest tokens, as the GPU draws."""
LISTED_TOKENS = 128
"""The number of likeliest tokens that the graph lists next to the logits: enough for a top-k and what penalties
change."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The model's shape and limits, its precisions, and the SHA-256 digest of each file by relative path."""

    context_length: int
    vocabulary_size: int
    layers: int
    heads: int
    width: int
    end_of_text_id: int
    precisions: tuple[str, ...]
    """The precisions, the default first; each has a folder that holds `GRAPH_FILE`."""
    cache_bits: dict[str, int]
    """The bits per number in the cache, by precision."""
    files: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def holds_index(self) -> bool:
        return any(name.startswith(f"{INDEX_FOLDER}/") for name in self.files)

    def precisions_for(self, provider: str) -> list[str]:
        """Return the precisions that run on `cpu` or `cuda`; the first is the default there."""
        return [name for name in self.precisions if provider == "cpu" or name in CUDA_PRECISIONS]


def listed_tokens(vocabulary_size: int) -> int:
    """Return how many tokens the graph lists per row: at most all of a small vocabulary."""
    return min(LISTED_TOKENS, vocabulary_size)


def measure_megabytes(folder: Path, precision: str) -> float:
    """Return the size of a precision's files in an engine folder, in units of 10^6 bytes."""
    return round(size_of([folder / precision]) / 1e6, 1)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an engine, with the digests of the files in `folder`."""
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    write_json(folder / MANIFEST_FILE, asdict(replace(manifest, files=files)))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an engine. Raises `UserError` if `folder` holds no engine, or one of another format."""
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
    """Raise `UserError` if a file that this precision needs is missing or not what was exported."""
    for name, digest in manifest.files.items():
        if not name.startswith((f"{precision}/", f"{INDEX_FOLDER}/")) and name not in READ_FILES:
            continue
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is missing; export the checkpoint again")
        if sha256_file(path) != digest:
            raise UserError(f"{path}: its SHA-256 is not the one in {MANIFEST_FILE}; export the checkpoint again")
