"""What CUDA needs on this machine, and what is missing."""

import ctypes
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import distributions

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail, Fail, RuntimeException

ERRORS = (RuntimeError, EPFail, Fail, RuntimeException)
"""What onnxruntime raises if a provider does not start or run, and what this package raises if CUDA does not."""
PROVIDER = "CUDAExecutionProvider"
PROCESSOR = "CPUExecutionProvider"
DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
RUNTIME = "cudart64_13.dll" if sys.platform == "win32" else "libcudart.so.13"
LIBRARIES = {
    "libcudart.so.13": "nvidia-cuda-runtime",
    "libcublas.so.13": "nvidia-cublas",
    "libcublasLt.so.13": "nvidia-cublas",
    "libcurand.so.10": "nvidia-curand",
    "libnvrtc.so.13": "nvidia-cuda-nvrtc",
    "libcudnn.so.9": "nvidia-cudnn-cu13",
}
"""The libraries that onnxruntime-gpu 1.31 and our kernel load besides the driver, and the packages that bring them."""
WARNING, FATAL = 2, 4  # levels of onnxruntime's log


@dataclass(frozen=True)
class Obstacle:
    """Something that CUDA lacks here, and what to do about it."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


def obstacles() -> list[Obstacle]:
    """Return what keeps CUDA from running, the first thing to fix first; empty if it should run."""
    found = []
    if PROVIDER not in ort.get_available_providers():
        if _installed() >= {"onnxruntime", "onnxruntime-gpu"}:
            problem = "onnxruntime is installed over onnxruntime-gpu, and hides its CUDA provider"
            remedy = "pip uninstall onnxruntime onnxruntime-gpu, then install the project again"
        else:
            problem = "this build of onnxruntime has no CUDA provider"
            remedy = "install onnxruntime-gpu, without onnxruntime"
        found.append(Obstacle(problem, remedy))
    if driver() is None:
        found.append(Obstacle("no NVIDIA driver (libcuda) is installed", "install one of version 580 or later"))
    if sys.platform == "linux":
        with mute_onnxruntime():
            ort.preload_dlls()
        missing = {library: package for library, package in LIBRARIES.items() if load(library) is None}
        if missing:
            packages = " ".join(sorted(set(missing.values())))
            command = "pip install --editable '.[cuda]'"
            remedy = f"install them by {command} ({packages}) or with a PyTorch built for CUDA 13"
            found.append(Obstacle(f"libraries of CUDA 13 are missing: {', '.join(missing)}", remedy))
    return found or _driver_obstacles()


def _driver_obstacles() -> list[Obstacle]:
    """Return why the driver offers no GPU, once all libraries are there."""
    if sys.platform != "linux":
        return []
    runtime = ctypes.CDLL(RUNTIME)
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    count = ctypes.c_int()
    code = runtime.cudaGetDeviceCount(ctypes.byref(count))
    if code == 0 and count.value > 0:
        return []
    runtime.cudaGetLastError()
    reason = runtime.cudaGetErrorString(code).decode() if code else "no GPU is visible"
    remedy = "check with nvidia-smi that the driver is 580 or later, and that CUDA_VISIBLE_DEVICES hides no GPU"
    return [Obstacle(f"the driver offers no GPU ({reason})", remedy)]


def reason_in(output: str) -> str:
    """Find in what onnxruntime printed why a provider did not start."""
    lines = [line.strip() for line in output.splitlines()]
    error = next((line for line in lines if line.startswith("EP Error ")), None)
    return error or next((line for line in lines if line.strip("* ")), "onnxruntime could not start it")


@contextmanager
def mute_onnxruntime() -> Iterator[io.StringIO]:
    """Collect what onnxruntime prints if CUDA does not start, and log only fatal errors meanwhile.

    onnxruntime has no way to ask for its log level, so afterwards it is the default, `WARNING`, again.
    """
    output = io.StringIO()
    ort.set_default_logger_severity(FATAL)
    try:
        with redirect_stdout(output):
            yield output
    finally:
        ort.set_default_logger_severity(WARNING)


def nodes_elsewhere(graph: ort.InferenceSession) -> list[str]:
    """Return the nodes of a graph that do not run on CUDA, as `operator name`. Its session must record assignments."""
    return [
        f"{node.op_type} {node.name}"
        for part in graph.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
    ]


def load(library: str) -> ctypes.CDLL | None:
    """Load a library of the system; None if it is missing."""
    try:
        return ctypes.CDLL(library)
    except OSError:
        return None


def driver() -> ctypes.CDLL | None:
    """Load NVIDIA's driver; None if it is not installed."""
    return next((found for library in DRIVER_LIBRARIES if (found := load(library)) is not None), None)


def _installed() -> set[str]:
    return {(distribution.metadata["Name"] or "").lower() for distribution in distributions()}
