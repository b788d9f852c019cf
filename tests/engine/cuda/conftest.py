"""The sampler's kernel on the host: compiled by a C++ compiler, with what it needs of CUDA in cuda_on_host.h."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.engine.cuda.kernel import SOURCE, Rows

COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread")

Launch = Callable[[Rows, int, int], None]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Return the kernel for blocks of any number of threads, with warps of one."""
    return compiled(tmp_path_factory.mktemp("kernel"), 1)


@pytest.fixture(scope="session")
def launch_warps(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Return the kernel for blocks of a multiple of four threads, with warps of four."""
    return compiled(tmp_path_factory.mktemp("kernel"), 4)


def compiled(folder: Path, warp: int) -> Launch:
    if COMPILER is None:
        pytest.skip("the kernel's tests need a C++ compiler (c++ or g++)")
    library = folder / "draw.so"
    header = Path(__file__).with_name("cuda_on_host.h")
    command = [COMPILER, *FLAGS, f"-DWARP={warp}", f"-I{SOURCE.parent}", "-x", "c++", str(header), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(library)).draw_on_host
    function.restype = None

    def run(rows: Rows, count: int, threads: int) -> None:
        function(ctypes.byref(rows), count, threads)

    return run
