"""One ONNX Runtime session over the standard GPT-2 graph, its KV cache bound from step to step."""

import ctypes
import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.engine.manifest import GRAPH_FILE, Manifest, check_files, read_manifest
from pipeline.errors import UserError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
WARNING, FATAL = 2, 4  # levels of onnxruntime's log
DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
NO_DRIVER = "no NVIDIA driver (libcuda) is installed"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A loaded graph and where it runs."""

    manifest: Manifest
    precision: str
    provider: str
    graph: ort.InferenceSession


@dataclass
class Cache:
    """Keys and values of the tokens so far, `[rows, heads, tokens, head_width]` a layer, on the session's device."""

    values: list[ort.OrtValue]
    tokens: int


def load_session(folder: Path, *, precision: str, provider: str, threads: int | None) -> Session:
    """Load a precision of the engine in `folder`; `auto` takes its first precision, and CUDA where it runs.

    Raises `UserError` where files are missing or changed, or where the provider asked for does not run.
    """
    manifest = read_manifest(folder)
    if precision == "auto":
        precision = manifest.precisions[0]
    if precision not in manifest.precisions:
        raise UserError(f"precision: {folder} holds {', '.join(manifest.precisions)}, not {precision!r}")
    if provider not in ("auto", *PROVIDERS):
        raise UserError(f"provider: {provider!r} is none of auto, {', '.join(PROVIDERS)}")
    check_files(folder, manifest, precision)
    path = folder / precision / GRAPH_FILE
    taken, graph = _open_graph(path, provider, threads)
    return Session(manifest, precision, taken, graph)


def cuda_obstacle() -> str | None:
    """Why CUDA cannot run here, or None where nothing is known to stand in the way."""
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        return "this build of onnxruntime has no CUDA provider; install onnxruntime-gpu, and no onnxruntime beside it"
    for library in DRIVER_LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return None
    return NO_DRIVER


def _open_graph(path: Path, provider: str, threads: int | None) -> tuple[str, ort.InferenceSession]:
    """The provider taken and its session. `auto` that finds CUDA not to run says why, and takes the processor."""
    if provider != "cpu":
        try:
            return "cuda", _open_on_cuda(path, threads)
        except UserError as error:
            if provider == "cuda":
                raise
            logger.info("provider: cpu (%s)", str(error).removeprefix("provider: "))
    return "cpu", ort.InferenceSession(str(path), _options(threads), providers=[PROVIDERS["cpu"]])


def _open_on_cuda(path: Path, threads: int | None) -> ort.InferenceSession:
    if obstacle := cuda_obstacle():
        raise UserError(f"provider: CUDA does not run here: {obstacle}")
    said = io.StringIO()
    # onnxruntime prints what is missing, and goes on without CUDA.
    ort.set_default_logger_severity(FATAL)
    with redirect_stdout(said):
        ort.preload_dlls()
        # The processor stays on the list for the nodes that compute shapes.
        graph = ort.InferenceSession(str(path), _options(threads), providers=[PROVIDERS["cuda"], PROVIDERS["cpu"]])
    ort.set_default_logger_severity(WARNING)
    if graph.get_providers()[0] != PROVIDERS["cuda"]:
        reason = said.getvalue().strip().partition("\n")[0] or "onnxruntime could not start it"
        raise UserError(
            f"provider: CUDA does not run here: {reason}; onnxruntime-gpu needs the CUDA 13 libraries and cuDNN 9 "
            "(pip install onnxruntime-gpu[cuda,cudnn])"
        )
    logger.info("provider: cuda")
    return graph


def _options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def empty_cache(session: Session, rows: int) -> Cache:
    shape = (rows, session.manifest.heads, 0, session.manifest.head_width)
    count = 2 * session.manifest.layers
    return Cache([_device_value(session, np.zeros(shape, np.float32)) for _ in range(count)], 0)


def run_step(
    session: Session,
    input_ids: NDArray[np.int64],
    position_ids: NDArray[np.int64],
    attention_mask: NDArray[np.int64],
    cache: Cache,
) -> tuple[NDArray[np.float32], Cache]:
    """Feed `[rows, new]` tokens after those in the cache; logits `[rows, new, vocabulary]` and the longer cache.

    `attention_mask` is `[rows, cached + new]`, 0 where a row is padding. The cache never leaves the device.
    """
    binding = session.graph.io_binding()
    binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids))
    binding.bind_cpu_input("position_ids", np.ascontiguousarray(position_ids))
    binding.bind_cpu_input("attention_mask", np.ascontiguousarray(attention_mask))
    names = [f"{layer}.{part}" for layer in range(session.manifest.layers) for part in ("key", "value")]
    for name, value in zip(names, cache.values, strict=True):
        binding.bind_ortvalue_input(f"past_key_values.{name}", value)
    binding.bind_output("logits", "cpu")
    for name in names:
        binding.bind_output(f"present.{name}", session.provider)
    session.graph.run_with_iobinding(binding)
    logits, *present = binding.get_outputs()
    return logits.numpy(), Cache(list(present), cache.tokens + input_ids.shape[1])


def pad_left(rows: Sequence[Sequence[int]], padding_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of ids as `[rows, longest]`, and the mask of the same shape that is 0 on padding."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), padding_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def positions(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of a padded batch: each row counts from 0 at its first real token."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def _device_value(session: Session, array: NDArray[np.float32]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array, session.provider, 0)
