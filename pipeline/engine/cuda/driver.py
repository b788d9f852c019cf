"""What CUDA needs on this machine, and what of it is missing."""

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
"""What onnxruntime raises where a provider does not start or run, and this package where CUDA itself does not."""
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
"""What onnxruntime-gpu 1.31 and our kernel load besides the driver, and the packages that bring it."""
WARNING, FATAL = 2, 4  # levels of onnxruntime's log


@dataclass(frozen=True)
class Obstacle:
    """Something that CUDA lacks, and what to do about it."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


def obstacles() -> list[Obstacle]:
    """What stands in the way of CUDA, the first thing to mend first; nothing where it should run."""
    found = []
    if PROVIDER not in ort.get_available_providers():
        if _installed() >= {"onnxruntime", "onnxruntime-gpu"}:
            problem = "onnxruntime is installed over onnxruntime-gpu, and hides its CUDA provider"
            remedy = "pip uninstall onnxruntime onnxruntime-gpu, then install the project again"
        else:
            problem = "this build of onnxruntime has no CUDA provider"
            remedy = "install onnxruntime-gpu, and no onnxruntime beside it"
        found.append(Obstacle(problem, remedy))
    if driver() is None:
        found.append(Obstacle("no NVIDIA driver (libcuda) is installed", "install one of version 580 or later"))
    if sys.platform == "linux":
        with quiet():
            ort.preload_dlls()
        missing = {library: package for library, package in LIBRARIES.items() if load(library) is None}
        if missing:
            packages = " ".join(sorted(set(missing.values())))
            remedy = f"pip install '.[cuda]' brings them ({packages}), and so does a PyTorch built for CUDA 13"
            found.append(Obstacle(f"libraries of CUDA 13 are missing: {', '.join(missing)}", remedy))
    return found or _driver_obstacles()


def _driver_obstacles() -> list[Obstacle]:
    """What the driver has against it, once all libraries are there."""
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
    remedy = "nvidia-smi shows driver and GPUs; version 580 is the least, and CUDA_VISIBLE_DEVICES may hide them"
    return [Obstacle(f"the driver offers no GPU ({reason})", remedy)]


def reason_in(said: str) -> str:
    """Why a provider did not start, of what onnxruntime printed meanwhile."""
    lines = [line.strip() for line in said.splitlines()]
    told = next((line for line in lines if line.startswith("EP Error ")), None)
    return told or next((line for line in lines if line.strip("* ")), "onnxruntime could not start it")


@contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Gather what onnxruntime prints where CUDA does not start; it would go on without."""
    said = io.StringIO()
    ort.set_default_logger_severity(FATAL)
    try:
        with redirect_stdout(said):
            yield said
    finally:
        ort.set_default_logger_severity(WARNING)


def nodes_elsewhere(graph: ort.InferenceSession) -> list[str]:
    """The nodes of a graph that do not run on CUDA, as `operator name`; its session recorded where each went."""
    return [
        f"{node.op_type} {node.name}"
        for part in graph.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
    ]


def load(library: str) -> ctypes.CDLL | None:
    """A library of the system; none where it is not there."""
    try:
        return ctypes.CDLL(library)
    except OSError:
        return None


def driver() -> ctypes.CDLL | None:
    """NVIDIA's driver; none where it is not installed."""
    return next((found for library in DRIVER_LIBRARIES if (found := load(library)) is not None), None)


def _installed() -> set[str]:
    return {(distribution.metadata["Name"] or "").lower() for distribution in distributions()}
