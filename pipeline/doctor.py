"""What this machine can run, where, and what is missing: `python -m pipeline doctor`."""

import ctypes
import shutil
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from pipeline import machine
from pipeline.cores import usable_cores
from pipeline.engine.cuda import driver
from pipeline.engine.manifest import CUDA_PRECISIONS, Manifest, read_manifest
from pipeline.engine.memory import CudaMemory
from pipeline.errors import UserError

READ_BYTES = 2**30
"""The size of the array that `read_bandwidth` sums; far more than any cache holds."""
READ_PASSES = 10
COPIED_BYTES = 2**30
COPIES = 10
NAME_BYTES = 256


def report(engine: Path) -> str:
    """Describe the machine, its libraries, the providers that start, and where the engine in a folder would run."""
    facts = machine.describe()
    threads = usable_cores()
    facts["bandwidth"] = f"{read_bandwidth(threads) / 1e9:.1f} GB/s of memory, read by {threads} threads"
    facts["providers"] = ", ".join(ort.get_available_providers()) + " are built into onnxruntime"
    facts["cpu"] = _first_run(driver.PROCESSOR) or "runs"
    obstacles = [str(obstacle) for obstacle in driver.obstacles()]
    failure = None if obstacles else _first_run(driver.PROVIDER)
    facts["cuda"] = "\n".join(obstacles) or failure or "runs"
    if not obstacles and not failure:
        facts |= _gpu()
    facts["engine"] = _engine(engine, on_cuda=not obstacles and not failure)
    width = max(map(len, facts)) + 2
    columns = max(shutil.get_terminal_size().columns, width + 40)
    lines = []
    for name, value in facts.items():
        wrapped = [line for part in value.splitlines() for line in textwrap.wrap(part, columns - width)]
        lines += [f"{label:<{width}}{line}" for label, line in zip([name, *[""] * len(wrapped)], wrapped, strict=False)]
    return "\n".join(lines)


def _engine(folder: Path, *, on_cuda: bool) -> str:
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return str(error)
    held = f"{folder} holds {', '.join(manifest.precisions)}"
    return f"{held}; by default it runs {_choice(manifest, on_cuda=on_cuda)}"


def _choice(manifest: Manifest, *, on_cuda: bool) -> str:
    if on_cuda and (held := manifest.precisions_for("cuda")):
        return f"{held[0]} on cuda"
    hint = f" (add {CUDA_PRECISIONS[0]} to export.precisions for the GPU)" if on_cuda else ""
    return f"{manifest.precisions_for('cpu')[0]} on cpu{hint}"


def _first_run(provider: str) -> str | None:
    """Return why a provider cannot run a graph of one node; None if it can."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("Add", ["a", "a"], ["b"])], "one", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with driver.mute_onnxruntime() as said:
        try:
            session = ort.InferenceSession(model.SerializeToString(), providers=[provider])
            (found,) = session.run(None, {"a": np.ones(4, np.float32)})
        except driver.ERRORS as error:
            return f"does not run: {str(error).splitlines()[0]}"
    if session.get_providers()[0] != provider:
        return f"does not run: {driver.reason_in(said.getvalue())}"
    return None if (found == 2).all() else "runs, and gives wrong results"


def _gpu() -> dict[str, str]:
    memory = CudaMemory()
    free, total = memory.room()
    return {
        "gpu": f"{_gpu_name()}, {total / 2**30:.1f} GiB, of which {free / 2**30:.1f} free",
        "gpu bandwidth": f"{gpu_bandwidth(memory) / 1e9:,.0f} GB/s, read and written",
    }


def read_bandwidth(threads: int) -> float:
    """Return how many bytes per second `threads` threads read from memory, in the best of several passes.

    A sum of float64 is the simplest pass that waits only for memory: NumPy adds eight bytes at a time with vector
    instructions, and lets other threads run meanwhile.
    """
    parts = np.array_split(np.ones(READ_BYTES // 8), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(READ_PASSES):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            seconds.append(time.perf_counter() - started)
    return READ_BYTES / min(seconds)


def gpu_bandwidth(memory: CudaMemory) -> float:
    """Return how many bytes per second the GPU reads and writes, in the best of several copies within its memory."""
    buffer = memory.zeros((2, COPIED_BYTES), np.uint8)
    seconds = []
    for _ in range(COPIES):
        memory.read(buffer, 0, 0)
        started = time.perf_counter()
        memory.copy_row(buffer, 0, 1)
        memory.read(buffer, 0, 0)
        seconds.append(time.perf_counter() - started)
    return 2 * COPIED_BYTES / min(seconds)


def _gpu_name() -> str:
    cuda, name = driver.driver(), ctypes.create_string_buffer(NAME_BYTES)
    if cuda is not None and cuda.cuInit(0) == 0 and cuda.cuDeviceGetName(name, NAME_BYTES, 0) == 0:
        return name.value.decode()
    return "a GPU without a name"
