"""The sampler's kernel on the host, compiled by a C++ compiler with what it needs of CUDA, and CUDA's stand-ins."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pretended_cuda
import pytest
from shared_folder import shared_folder

from pipeline.engine.cuda.kernel import SOURCE, Rows

COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread")

Launch = Callable[[Rows, int, int], None]


@pytest.fixture(scope="session")
def libraries() -> Path:
    """Return the folder with the stand-ins for CUDA's libraries, for `LD_LIBRARY_PATH`."""
    if obstacle := pretended_cuda.obstacle():
        pytest.skip(obstacle)
    return shared_folder("pretended-cuda", pretended_cuda.build)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Return the kernel for blocks of any number of threads, with warps of one."""
    return compiled(1)


@pytest.fixture(scope="session")
def launch_warps() -> Launch:
    """Return the kernel for blocks of a multiple of four threads, with warps of four."""
    return compiled(4)


def compiled(warp: int) -> Launch:
    if COMPILER is None:
        pytest.skip("the kernel's tests need a C++ compiler (c++ or g++)")
    compiler = COMPILER

    def build(folder: Path) -> None:
        header = Path(__file__).with_name("cuda_on_host.h")
        flags = [*FLAGS, f"-DWARP={warp}", f"-I{SOURCE.parent}", "-x", "c++"]
        command = [compiler, *flags, str(header), "-o", str(folder / "draw.so")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    library = shared_folder(f"kernel-{warp}", build) / "draw.so"
    function = ctypes.CDLL(str(library)).draw_on_host
    function.restype = None

    def run(rows: Rows, count: int, threads: int) -> None:
        function(ctypes.byref(rows), count, threads)

    return run
