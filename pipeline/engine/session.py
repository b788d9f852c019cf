"""A loaded engine: the model's graph and its KV cache, one slot per continuation, updated in place.

The cache has one buffer per layer for keys and one for values, `[slots, heads, context, head width]`. Past and present
of the graph are bound to the same memory, so a step writes what is new and copies nothing. Decoding runs the first rows
of the buffers, prefill a single slot; each has a binding that is made once. On the processor only numbers at fixed
addresses change from step to step. On CUDA, where `DeviceLoop` takes most steps, what the host feeds is bound and
copied again for each step.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.cores import threads_within_quota
from pipeline.engine.cuda import driver
from pipeline.engine.cuda.kernel import Kernel, Rows
from pipeline.engine.cuda.rows import round_up_rows
from pipeline.engine.filters import Followers
from pipeline.engine.manifest import (
    CUDA_PRECISIONS,
    GRAPH_FILE,
    INDEX_FOLDER,
    STATES,
    Manifest,
    check_files,
    listed_tokens,
    read_manifest,
)
from pipeline.engine.memory import CudaMemory, HostMemory, Memory, Place
from pipeline.engine.verbatim import VerbatimText, open_index
from pipeline.errors import UserError

PROVIDERS = ("cpu", "cuda")
CPU_PASS_TOKENS = 256
"""The number of prompt tokens that the processor reads per pass. More gain nothing and take more memory."""
CACHE_TYPES: dict[int, type[np.generic]] = {8: np.int8, 16: np.float16, 32: np.float32}

Draw = Callable[[Rows, int], None]

logger = logging.getLogger(__name__)


class Session:
    """A graph and its cache of `slots` continuations. Not safe to use from two threads at once."""

    def __init__(
        self,
        manifest: Manifest,
        precision: str,
        provider: str,
        graph: ort.InferenceSession,
        memory: Memory,
        slots: int,
        draw: Draw | None = None,
        followers: Followers | None = None,
    ):
        self.manifest = manifest
        self.precision = precision
        self.provider = provider
        self.graph = graph
        self.memory = memory
        self.slots = slots
        self.draw = draw
        """The function that draws the next token of the first rows on the device; None if the host draws."""
        self.followers = followers
        """The lookup of what follows a run in the training text; None if the engine holds no index of it."""
        self.held: list[list[int]] = [[] for _ in range(slots + 1)]
        """By slot, the tokens whose keys and values it is known to hold, from position 0 on. The last slot is that in
        which texts are read."""
        self.lists_tokens = precision not in CUDA_PRECISIONS
        self.logits = np.zeros((slots, manifest.vocabulary_size), np.float32)
        """The logits of what each slot was fed last, float32 `[slots, vocabulary]`."""
        listed = listed_tokens(manifest.vocabulary_size) if self.lists_tokens else 0
        self.top_logits = np.zeros((slots, listed), np.float32)
        """The largest of each row of `logits` in descending order, float32 `[slots, listed]`."""
        self.top_ids = np.zeros(self.top_logits.shape, np.int64)
        """The token ids of `top_logits`, int64 `[slots, listed]`."""
        cache_type = CACHE_TYPES[manifest.cache_bits[precision]]
        # One more slot, in which texts are read.
        shape = (slots + 1, manifest.heads, manifest.context_length, manifest.head_width)
        self._cache = {
            f"{layer}.{part}": memory.zeros(shape, cache_type)
            for layer in range(manifest.layers)
            for part in ("key", "value")
        }
        self._input_ids = np.zeros((slots, 1), np.int64)
        self._position_ids = np.zeros((slots, 1), np.int64)
        self._last_positions = np.zeros(slots, np.int32)
        self._total_tokens = np.zeros((), np.int32)
        self._every_row = np.arange(slots)
        self._uncaptured = _run_options(provider, capture=None)
        self._captures = 0
        self._decoding: dict[int, ort.IOBinding] = {}
        self._filling: dict[tuple[int, bool], ort.IOBinding] = {}
        """The bindings by slot and by whether states are read: an output that is bound once stays bound."""

    def decode(self, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Feed one token to each of the first slots; their logits are then in the first rows of `logits`.

        The position of a token is the number of tokens that its slot holds before it.
        """
        count = len(token_ids)
        self._input_ids[:count, 0] = token_ids
        self._position_ids[:count, 0] = positions
        self._last_positions[:count] = positions
        self._total_tokens[...] = max(positions) + 1
        if count not in self._decoding:
            self._decoding[count] = self._bind_decoding(count)
        if self.provider != "cpu":
            self._bind_fed(self._decoding[count], count)
        for slot, position in enumerate(positions):
            self.record(slot, position, ())
        self.graph.run_with_iobinding(self._decoding[count], self._uncaptured)
        for slot, (token_id, position) in enumerate(zip(token_ids, positions, strict=True)):
            self.record(slot, position, (token_id,))

    def prefill(self, slot: int, token_ids: Sequence[int], past_tokens: int) -> None:
        """Feed tokens to a slot that holds `past_tokens`; `logits[slot]` are then those of the last token."""
        self.record(slot, past_tokens, ())
        pass_tokens = CPU_PASS_TOKENS if self.provider == "cpu" else len(token_ids)
        for start in range(0, len(token_ids), pass_tokens):
            fed = token_ids[start : start + pass_tokens]
            binding = self._bind_prefill(slot, fed, past_tokens + start, np.array([len(fed) - 1]))
            self._bind_logits(binding, slot, 1)
            self.graph.run_with_iobinding(binding, self._uncaptured)
        self.record(slot, past_tokens, token_ids)

    def read(
        self, token_ids: Sequence[int], past_tokens: int, *, states: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.floating]]:
        """Feed tokens of a text after its first `past_tokens`, and return what the model makes of each.

        These are its logits, float32 `[tokens, vocabulary]`, and its last hidden state in the graph's own floats,
        `[tokens, width]`, or `[tokens, 0]` without `states`, which then costs nothing. The text has a slot of its own,
        so that no continuation is disturbed. Raises `UserError` if the graph has no output for the states.
        """
        if states and STATES not in (output.name for output in self.graph.get_outputs()):
            raise UserError("engine: its graph was exported without hidden states; export the checkpoint again")
        tokens, half = len(token_ids), self.precision in CUDA_PRECISIONS
        logits = np.empty((tokens, self.manifest.vocabulary_size), np.float32)
        found = np.empty((tokens, self.manifest.width if states else 0), np.float16 if half else np.float32)
        # The scheduler holds the device for a whole step; a text is read outside of its steps.
        with self.memory.held():
            self.record(self.slots, past_tokens, ())
            binding = self._bind_prefill(self.slots, token_ids, past_tokens, np.arange(tokens), reads_states=states)
            bind(binding.bind_output, "logits", place(logits))
            if states:
                bind(binding.bind_output, STATES, place(found))
            self.graph.run_with_iobinding(binding, self._uncaptured)
        self.record(self.slots, past_tokens, token_ids)
        return logits, found

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of a slot to another."""
        self.held[target] = self.held[source][:tokens]
        if tokens == 0:
            return
        for buffer in self._cache.values():
            self.memory.copy_tokens(buffer, source, target, tokens)

    def record(self, slot: int, position: int, token_ids: Sequence[int]) -> None:
        """Note that a slot has been fed tokens from a position on: it holds them, and nothing known after them.

        Before they are fed, none are noted, in case that fails.
        """
        held = self.held[slot]
        if position > len(held):
            self.held[slot] = []
        else:
            held[position:] = token_ids

    def forget(self) -> None:
        """Take all that slots hold for unknown."""
        self.held = [[] for _ in self.held]

    def capture_options(self) -> ort.RunOptions:
        """Return the options to run a binding that uses only device memory.

        On CUDA its first run is captured, and no run is waited for. A capture holds the binding's addresses, so the
        options belong to this binding alone.
        """
        self._captures += 1
        return _run_options(self.provider, capture=self._captures)

    def bind_cache(self, binding: ort.IOBinding, start: int, count: int) -> None:
        """Bind the cache of some slots, both to be read and to be written."""
        for name, buffer in self._cache.items():
            bind(binding.bind_input, f"past.{name}", buffer.rows(start, count))
            bind(binding.bind_output, f"present.{name}", buffer.rows(start, count))

    def _bind_decoding(self, count: int) -> ort.IOBinding:
        binding = self.graph.io_binding()
        self._bind_fed(binding, count)
        self._bind_logits(binding, 0, count)
        self.bind_cache(binding, 0, count)
        return binding

    def _bind_prefill(
        self,
        slot: int,
        token_ids: Sequence[int],
        past_tokens: int,
        rows: NDArray[np.int64],
        *,
        reads_states: bool = False,
    ) -> ort.IOBinding:
        key = (slot, reads_states)
        if key not in self._filling:
            self._filling[key] = self.graph.io_binding()
            self.bind_cache(self._filling[key], slot, 1)
        binding = self._filling[key]
        end = past_tokens + len(token_ids)
        # ONNX Runtime copies an input that is bound like this.
        binding.bind_cpu_input("input_ids", np.array([token_ids], np.int64))
        binding.bind_cpu_input("position_ids", np.arange(past_tokens, end, dtype=np.int64)[None])
        binding.bind_cpu_input("last_positions", np.array([end - 1], np.int32))
        binding.bind_cpu_input("total_tokens", np.array(end, np.int32))
        binding.bind_cpu_input("logit_rows", rows.astype(np.int64))
        return binding

    def _bind_fed(self, binding: ort.IOBinding, count: int) -> None:
        """Bind what the first rows are fed. On CUDA this copies it to the device, so it is done for each step."""
        bind(binding.bind_input, "input_ids", place(self._input_ids[:count]))
        bind(binding.bind_input, "position_ids", place(self._position_ids[:count]))
        bind(binding.bind_input, "last_positions", place(self._last_positions[:count]))
        bind(binding.bind_input, "logit_rows", place(self._every_row[:count]))
        bind(binding.bind_input, "total_tokens", place(self._total_tokens))

    def _bind_logits(self, binding: ort.IOBinding, start: int, count: int) -> None:
        for name in ("logits", "top_logits", "top_ids") if self.lists_tokens else ("logits",):
            bind(binding.bind_output, name, place(getattr(self, name)[start : start + count]))


def place(array: NDArray[Any]) -> Place:
    """Return the place of an array of the host. The caller keeps the array alive."""
    return "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data


def bind(bind_to: Callable[..., None], name: str, where: Place) -> None:
    """Bind an input or output to memory; `bind_to` is the binding's method for it."""
    bind_to(name, *where)


def load_session(folder: Path, *, precision: str, provider: str, threads: int | None, slots: int) -> Session:
    """Load a precision of the engine in `folder`.

    `provider="auto"` takes CUDA if it runs and the folder holds a precision for it, else the processor.
    `precision="auto"` takes the first precision for the provider. Raises `UserError` if files are missing or changed,
    or if the provider does not run.
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
    precision = manifest.precisions_for("cpu")[0] if precision == "auto" else precision
    options = session_options(threads)
    # The graph is already fused as it should run: a higher level would join what is faster apart on the processor.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    graph = _open(folder, manifest, precision, options, [driver.PROCESSOR])
    return Session(manifest, precision, "cpu", graph, HostMemory(), slots, followers=_followers(folder, manifest))


def _followers(folder: Path, manifest: Manifest) -> Followers | None:
    if not manifest.holds_index:
        return None
    return VerbatimText(open_index(folder / INDEX_FOLDER), manifest.end_of_text_id).followers


def _open(
    folder: Path, manifest: Manifest, precision: str, options: ort.SessionOptions, providers: list[Any]
) -> ort.InferenceSession:
    """Open the graph while its files are checked: both read all of them, and each takes a second.

    Raises `UserError` if a file is not what the manifest says, even if opening the graph failed, too.
    """
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_files, folder, manifest, precision)
        try:
            return ort.InferenceSession(str(folder / precision / GRAPH_FILE), options, providers=providers)
        finally:
            checked.result()


def session_options(threads: int | None) -> ort.SessionOptions:
    """Return options for `threads` per operator; None is one per physical core, or as many as a quota leaves room for.

    Raises `UserError` unless it is a whole number from 1.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UserError(f"threads: {threads!r} must be a whole number from 1, or unset for all cores")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # ONNX Runtime sees which cores a process may run on, but not a quota.
    threads = threads_within_quota() if threads is None else threads
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _load_on_cuda(folder: Path, manifest: Manifest, precision: str, threads: int | None, slots: int) -> Session:
    if found := driver.obstacles():
        raise UserError(f"provider: CUDA does not run here: {found[0]}")
    held = manifest.precisions_for("cuda")
    if not held or precision not in ("auto", *held):
        raise UserError(
            f"provider: CUDA runs {' or '.join(CUDA_PRECISIONS)}, and {folder} "
            + (f"was asked for {precision}; ask for {held[0]}" if held else "holds neither")
            + ("" if held else f"; add {CUDA_PRECISIONS[0]} to export.precisions")
        )
    precision = held[0] if precision == "auto" else precision
    try:
        return _open_on_cuda(folder, manifest, precision, threads, slots)
    except driver.ERRORS as error:
        raise UserError(f"provider: CUDA does not start: {str(error).splitlines()[0]}") from error


def _open_on_cuda(folder: Path, manifest: Manifest, precision: str, threads: int | None, slots: int) -> Session:
    memory = CudaMemory()
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # The graph, the draw and all copies share one stream, so they run in the order of the calls. Memory that grows in
    # powers of two would take twice what the weights need.
    settings = {
        "enable_cuda_graph": "1",
        "user_compute_stream": str(memory.stream),
        "arena_extend_strategy": "kSameAsRequested",
    }
    with driver.mute_onnxruntime() as output:
        # The processor stays on the list because some inputs are read from its memory.
        graph = _open(folder, manifest, precision, options, [(driver.PROVIDER, settings), driver.PROCESSOR])
    if graph.get_providers()[0] != driver.PROVIDER:
        reason = driver.reason_in(output.getvalue())
        raise UserError(f"provider: CUDA does not run here: {reason}; `python -m pipeline doctor` says what is missing")
    if elsewhere := driver.nodes_elsewhere(graph):
        raise UserError(
            f"provider: CUDA does not run {len(elsewhere)} nodes of {folder}, such as {elsewhere[0]}; "
            "export the checkpoint again with this version, or report it"
        )
    logger.info("provider: cuda (%s)", precision)
    rows, draw = round_up_rows(slots), Kernel(memory.stream)
    return Session(manifest, precision, "cuda", graph, memory, rows, draw, _followers(folder, manifest))


def _run_options(provider: str, *, capture: int | None) -> ort.RunOptions:
    """Return the options to run a graph: as the CUDA graph with this number, without waiting for it, or uncaptured."""
    options = ort.RunOptions()
    if provider == "cuda":
        options.add_run_config_entry("gpu_graph_id", str(-1 if capture is None else capture))
        if capture is not None:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
