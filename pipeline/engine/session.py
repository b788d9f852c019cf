"""A loaded engine: the model's graph with its KV cache, a slot a continuation, updated in place.

The cache is one buffer a layer for keys and one for values, `[slots, heads, context, head width]`. Past and present of
the graph are bound to the same memory, so a step writes what is new and copies nothing. Decoding runs the first rows of
the buffers, prefill a single slot; each has a binding that is made once. Only numbers in fixed places change from step
to step.
"""

import ctypes
import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.engine.manifest import GRAPH_FILE, Manifest, check_files, listed_tokens, read_manifest
from pipeline.errors import UserError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CUDA_PRECISION = "float16"
"""The only one whose attention runs on CUDA."""
CACHE_TYPES: dict[int, type[np.generic]] = {8: np.int8, 16: np.float16, 32: np.float32}
WARNING, FATAL = 2, 4  # levels of onnxruntime's log
DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
NO_DRIVER = "no NVIDIA driver (libcuda) is installed"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Buffer:
    """Memory at a fixed place, on the host or on a GPU."""

    device: str
    dtype: type[np.generic]
    shape: tuple[int, ...]
    address: int
    owner: NDArray[np.generic] | ort.OrtValue

    def rows(self, start: int, count: int) -> "Place":
        """Rows of the first dimension, as a binding takes them."""
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize
        return self.device, 0, self.dtype, [count, *self.shape[1:]], self.address + start * row_bytes


class Session:
    """A graph and its cache of `slots` continuations. Not safe to use from two threads at once."""

    def __init__(self, manifest: Manifest, precision: str, provider: str, graph: ort.InferenceSession, slots: int):
        self.manifest = manifest
        self.precision = precision
        self.provider = provider
        self.graph = graph
        self.slots = slots
        self.logits = np.zeros((slots, manifest.vocabulary_size), np.float32)
        """Row i: the logits of what slot i was fed last, float32 `[slots, vocabulary]`."""
        self.top_logits = np.zeros((slots, listed_tokens(manifest.vocabulary_size)), np.float32)
        """The largest of each row of `logits`, in descending order, float32 `[slots, listed]`."""
        self.top_ids = np.zeros(self.top_logits.shape, np.int64)
        """Whose they are."""
        cache_type = CACHE_TYPES[manifest.cache_bits[precision]]
        # One more, in which texts are scored.
        shape = (slots + 1, manifest.heads, manifest.context_length, manifest.head_width)
        self._cache = {
            f"{layer}.{part}": _allocate(provider, cache_type, shape)
            for layer in range(manifest.layers)
            for part in ("key", "value")
        }
        self._input_ids = np.zeros((slots, 1), np.int64)
        self._position_ids = np.zeros((slots, 1), np.int64)
        self._last_positions = np.zeros(slots, np.int32)
        self._total_tokens = np.zeros((), np.int32)
        self._every_row = np.arange(slots)
        self._decoding: dict[int, ort.IOBinding] = {}
        self._filling: dict[int, ort.IOBinding] = {}

    def decode(self, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Feed one token to each of the first slots; their logits then stand in the first rows of `logits`.

        `positions` are where the tokens stand, that is how many their slots hold before them.
        """
        count = len(token_ids)
        self._input_ids[:count, 0] = token_ids
        self._position_ids[:count, 0] = positions
        self._last_positions[:count] = positions
        self._total_tokens[...] = max(positions) + 1
        if count not in self._decoding:
            self._decoding[count] = self._bind_decoding(count)
        self.graph.run_with_iobinding(self._decoding[count])

    def prefill(self, slot: int, token_ids: Sequence[int], past_tokens: int) -> None:
        """Feed tokens to a slot that holds `past_tokens`, in one pass; `logits[slot]` are then those of the last."""
        binding = self._bind_prefill(slot, token_ids, past_tokens, np.array([len(token_ids) - 1]))
        self._bind_logits(binding, slot, 1)
        self.graph.run_with_iobinding(binding)

    def score(self, token_ids: Sequence[int], past_tokens: int) -> NDArray[np.float32]:
        """Feed tokens of a text after its first `past_tokens`; the logits of each, float32 `[tokens, vocabulary]`.

        The text has a slot to itself, so that no continuation is disturbed.
        """
        logits = np.empty((len(token_ids), self.manifest.vocabulary_size), np.float32)
        binding = self._bind_prefill(self.slots, token_ids, past_tokens, np.arange(len(token_ids)))
        bind(binding.bind_output, "logits", place(logits))
        self.graph.run_with_iobinding(binding)
        return logits

    @property
    def can_copy(self) -> bool:
        """Whether slots can be copied: where the cache is the host's."""
        return self.provider == "cpu"

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a slot the first `tokens` of another's."""
        for buffer in self._cache.values():
            values = buffer.owner
            values[target, :, :tokens] = values[source, :, :tokens]

    def _bind_decoding(self, count: int) -> ort.IOBinding:
        binding = self.graph.io_binding()
        bind(binding.bind_input, "input_ids", place(self._input_ids[:count]))
        bind(binding.bind_input, "position_ids", place(self._position_ids[:count]))
        bind(binding.bind_input, "last_positions", place(self._last_positions[:count]))
        bind(binding.bind_input, "total_tokens", place(self._total_tokens))
        bind(binding.bind_input, "logit_rows", place(self._every_row[:count]))
        self._bind_logits(binding, 0, count)
        self._bind_cache(binding, 0, count)
        return binding

    def _bind_prefill(
        self, slot: int, token_ids: Sequence[int], past_tokens: int, rows: NDArray[np.int64]
    ) -> ort.IOBinding:
        if slot not in self._filling:
            self._filling[slot] = self.graph.io_binding()
            self._bind_cache(self._filling[slot], slot, 1)
        binding = self._filling[slot]
        end = past_tokens + len(token_ids)
        # ONNX Runtime copies what is bound so.
        binding.bind_cpu_input("input_ids", np.array([token_ids], np.int64))
        binding.bind_cpu_input("position_ids", np.arange(past_tokens, end, dtype=np.int64)[None])
        binding.bind_cpu_input("last_positions", np.array([end - 1], np.int32))
        binding.bind_cpu_input("total_tokens", np.array(end, np.int32))
        binding.bind_cpu_input("logit_rows", rows.astype(np.int64))
        return binding

    def _bind_logits(self, binding: ort.IOBinding, start: int, count: int) -> None:
        for name in ("logits", "top_logits", "top_ids"):
            bind(binding.bind_output, name, place(getattr(self, name)[start : start + count]))

    def _bind_cache(self, binding: ort.IOBinding, start: int, count: int) -> None:
        for name, buffer in self._cache.items():
            bind(binding.bind_input, f"past.{name}", buffer.rows(start, count))
            bind(binding.bind_output, f"present.{name}", buffer.rows(start, count))


def _allocate(provider: str, dtype: type[np.generic], shape: tuple[int, ...]) -> _Buffer:
    """Zeros. Those of the host take memory only once a slot is used."""
    if provider == "cpu":
        array = np.zeros(shape, dtype)
        return _Buffer("cpu", dtype, shape, array.ctypes.data, array)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, provider, 0)
    return _Buffer(provider, dtype, shape, value.data_ptr(), value)


Place = tuple[str, int, type[np.generic], list[int], int]
"""Device, its number, dtype, shape and address: memory as a binding takes it."""


def place(array: NDArray[Any]) -> Place:
    """Where an array of the host lies. Whoever binds it keeps it alive."""
    return "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data


def bind(bind_to: Callable[..., None], name: str, where: Place) -> None:
    """Bind an input or output, `bind_to` being the binding's method for it, to memory."""
    bind_to(name, *where)


def load_session(folder: Path, *, precision: str, provider: str, threads: int | None, slots: int) -> Session:
    """Load a precision of the engine in `folder`.

    `provider` `auto` takes CUDA where it runs and the folder holds the precision for it. `precision` `auto` takes that
    on CUDA, on the processor the first that the folder lists. Raises `UserError` where files are missing or changed,
    or where the provider asked for does not run.
    """
    manifest = read_manifest(folder)
    if provider not in ("auto", *PROVIDERS):
        raise UserError(f"provider: {provider!r} is none of auto, {', '.join(PROVIDERS)}")
    if precision not in ("auto", *manifest.precisions):
        raise UserError(f"precision: {folder} holds {', '.join(manifest.precisions)}, not {precision!r}")
    if provider != "cpu":
        try:
            return _load_on_cuda(folder, manifest, precision, threads, slots)
        except UserError as error:
            if provider == "cuda":
                raise
            logger.info("provider: cpu (%s)", str(error).removeprefix("provider: "))
    if precision == "auto":
        precision = manifest.precisions[0]
    options = session_options(threads)
    # The graph is fused as it is to run: beyond this level, what is faster apart on the processor would be joined.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    graph = _open(folder, manifest, precision, options, [PROVIDERS["cpu"]])
    return Session(manifest, precision, "cpu", graph, slots)


def _open(
    folder: Path, manifest: Manifest, precision: str, options: ort.SessionOptions, providers: list[str]
) -> ort.InferenceSession:
    """Open the graph while the digests of its files are taken: both read all of them, and either takes a second.

    Raises `UserError` where a file is not what the manifest says, whatever the graph came to.
    """
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_files, folder, manifest, precision)
        try:
            return ort.InferenceSession(str(folder / precision / GRAPH_FILE), options, providers=providers)
        finally:
            checked.result()


def session_options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


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


def _load_on_cuda(folder: Path, manifest: Manifest, precision: str, threads: int | None, slots: int) -> Session:
    if obstacle := cuda_obstacle():
        raise UserError(f"provider: CUDA does not run here: {obstacle}")
    if CUDA_PRECISION not in manifest.precisions or precision not in ("auto", CUDA_PRECISION):
        raise UserError(
            f"provider: CUDA runs {CUDA_PRECISION}, and {folder} "
            + (f"was asked for {precision}" if CUDA_PRECISION in manifest.precisions else "does not hold it")
            + f"; add {CUDA_PRECISION} to export.precisions, and ask for it"
        )
    said = io.StringIO()
    # onnxruntime prints what is missing, and goes on without CUDA.
    ort.set_default_logger_severity(FATAL)
    try:
        with redirect_stdout(said):
            ort.preload_dlls()
            # The processor stays on the list for what is read from its memory.
            providers = [PROVIDERS["cuda"], PROVIDERS["cpu"]]
            graph = _open(folder, manifest, CUDA_PRECISION, session_options(threads), providers)
    finally:
        ort.set_default_logger_severity(WARNING)
    if graph.get_providers()[0] != PROVIDERS["cuda"]:
        reason = said.getvalue().strip().partition("\n")[0] or "onnxruntime could not start it"
        raise UserError(
            f"provider: CUDA does not run here: {reason}; onnxruntime-gpu needs the CUDA 13 libraries and cuDNN 9 "
            "(pip install onnxruntime-gpu[cuda,cudnn])"
        )
    logger.info("provider: cuda")
    return Session(manifest, CUDA_PRECISION, "cuda", graph, slots)
