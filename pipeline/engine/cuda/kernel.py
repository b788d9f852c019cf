"""The sampler's kernel: compiled for this machine's GPU when an engine is loaded, launched once per step."""

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.engine.cuda import driver
from pipeline.engine.cuda.rows import STATE
from pipeline.engine.memory import Buffer

SOURCE = Path(__file__).with_name("sampler.cu")
COMPILER = "nvrtc64_130_0.dll" if sys.platform == "win32" else "libnvrtc.so.13"
# Do not contract products and sums: NumPy rounds between them.
OPTIONS = ("--fmad=false",)
THREADS = 1024
"""The number of threads per block; a block draws for a row."""
MAJOR, MINOR = 75, 76  # the driver's numbers for the two parts of a GPU's capability


class Rows(ctypes.Structure):
    """The kernel's argument: the address of each field's array. It mirrors the struct of the same name in `SOURCE`."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in STATE),
        ("keys", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("vocabulary", ctypes.c_longlong),
        ("context", ctypes.c_longlong),
    ]


def rows_of(buffers: Mapping[str, Buffer], vocabulary_size: int, context_length: int) -> Rows:
    """Return the kernel's argument for `logits`, the fields of `STATE`, and the scratch `keys` and `weights`."""
    places = {name: buffer.address for name, buffer in buffers.items()}
    return Rows(**places, vocabulary=vocabulary_size, context=context_length)


class Kernel:
    """`draw` of `SOURCE` on the first GPU. The CUDA runtime must have opened the GPU's context in this thread."""

    def __init__(self, stream: int) -> None:
        """Compile and load the kernel. Raises `RuntimeError` with the compiler's or driver's reason."""
        self._stream = ctypes.c_void_p(stream)
        cuda = driver.driver()
        if cuda is None:
            raise RuntimeError("NVIDIA's driver is not installed")
        self._driver = cuda
        capability = "".join(str(self._attribute(number)) for number in (MAJOR, MINOR))
        image = compile_for(capability)
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        self._call("cuModuleGetFunction", ctypes.byref(self._function), module, b"draw")

    def __call__(self, rows: Rows, count: int) -> None:
        """Queue a draw for the first `count` rows."""
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(rows))
        grid, block = (count, 1, 1), (THREADS, 1, 1)
        self._call("cuLaunchKernel", self._function, *grid, *block, 0, self._stream, arguments, None)

    def _attribute(self, number: int) -> int:
        value, device = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, name)(*arguments):
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")


def compile_for(capability: str) -> bytes:
    """Compile `SOURCE` for a GPU of this capability, such as `90`. Needs NVRTC, but no GPU."""
    compiler = ctypes.CDLL(COMPILER)
    program = ctypes.c_void_p()
    _check(
        compiler, "nvrtcCreateProgram", ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None
    )
    options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture=sm_{capability}")]
    if compiler.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
        raise RuntimeError(f"{SOURCE.name}: {_text(compiler, program, 'ProgramLog').decode().strip()}")
    return _text(compiler, program, "CUBIN")


def _text(compiler: ctypes.CDLL, program: ctypes.c_void_p, name: str) -> bytes:
    size = ctypes.c_size_t()
    _check(compiler, f"nvrtcGet{name}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _check(compiler, f"nvrtcGet{name}", program, text)
    return text.raw


def _check(compiler: ctypes.CDLL, name: str, *arguments: Any) -> None:
    if code := getattr(compiler, name)(*arguments):
        raise RuntimeError(f"{name} ended with {code}")
