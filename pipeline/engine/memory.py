"""Memory at fixed addresses, on the host or on a GPU, for bindings of ONNX Runtime; and its copies.

Work on a GPU's memory is queued on one stream, on which the graphs run, too. It happens in the order of the calls, and
the host does not wait for it.
"""

import ctypes
import mmap
import sys
import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from threading import RLock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.cuda.driver import RUNTIME
from pipeline.errors import UserError

OUT_OF_MEMORY = 2
KEPT_SOURCES = 128
"""The number of latest arrays written to a GPU that are kept alive: older ones have been copied long ago."""
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3
NON_BLOCKING = 1

Place = tuple[str, int, type[np.generic], list[int], int]
"""Memory as a binding takes it: device, device number, dtype, shape and address."""


@dataclass(frozen=True)
class Buffer:
    """An array at a fixed address."""

    device: str
    dtype: type[np.generic]
    shape: tuple[int, ...]
    address: int
    array: NDArray[Any] | None
    """The array itself if it is on the host; None if it is on a GPU."""

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def rows(self, start: int, count: int) -> Place:
        """Return rows of the first dimension as a binding takes them."""
        return self.device, 0, self.dtype, [count, *self.shape[1:]], self.address + start * self.row_bytes


class Memory(Protocol):
    """A device's memory."""

    def held(self) -> AbstractContextManager[object]:
        """Keep other threads from the device for a block.

        ONNX Runtime captures graphs in CUDA's global mode, in which work of any other thread spoils the capture.
        """

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        """Allocate memory that holds zeros; it lives as long as this object."""

    def write(self, buffer: Buffer, row: int, values: NDArray[Any]) -> None:
        """Write rows of a buffer, beginning at `row`."""

    def read(self, buffer: Buffer, row: int, count: int) -> NDArray[Any]:
        """Return rows of a buffer after everything queued before is done."""

    def peek(self, buffer: Buffer, row: int, count: int) -> NDArray[Any]:
        """Return rows of a buffer as they are now, whatever is still queued."""

    def copy_row(self, buffer: Buffer, source: int, target: int) -> None:
        """Copy a row to another."""

    def copy_tokens(self, cache: Buffer, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a slot of a cache, `[slots, heads, context, head width]`, to another slot."""


class HostMemory:
    """The memory of the processor. Zeros take up memory only once they are written to, page by page."""

    def held(self) -> AbstractContextManager[object]:
        return nullcontext()

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        # NumPy would ask for pages of 2 MB. The first tokens of a slot are spread over all of its memory, so that they
        # would take up the whole of it.
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            with suppress(OSError):  # a kernel without huge pages does not know the advice
                pages.madvise(mmap.MADV_NOHUGEPAGE)
        array: NDArray[Any] = np.frombuffer(pages, dtype).reshape(shape)
        return Buffer("cpu", dtype, shape, array.ctypes.data, array)

    def write(self, buffer: Buffer, row: int, values: NDArray[Any]) -> None:
        _array(buffer)[row : row + len(values)] = values

    def read(self, buffer: Buffer, row: int, count: int) -> NDArray[Any]:
        return _array(buffer)[row : row + count].copy()

    def peek(self, buffer: Buffer, row: int, count: int) -> NDArray[Any]:
        return self.read(buffer, row, count)

    def copy_row(self, buffer: Buffer, source: int, target: int) -> None:
        _array(buffer)[target] = _array(buffer)[source]

    def copy_tokens(self, cache: Buffer, source: int, target: int, tokens: int) -> None:
        _array(cache)[target, :, :tokens] = _array(cache)[source, :, :tokens]


class CudaMemory:
    """The memory of the first GPU, through CUDA's runtime, which must be loaded."""

    DEVICE = RLock()

    def __init__(self) -> None:
        self._runtime = ctypes.CDLL(RUNTIME)
        self._runtime.cudaGetErrorString.restype = ctypes.c_char_p
        # ONNX Runtime uses device 0, too, whatever else in the process has chosen.
        self._call("cudaSetDevice", 0)
        self._written: deque[NDArray[Any]] = deque(maxlen=KEPT_SOURCES)
        self.stream = self._new_stream()
        """The address of the stream on which everything runs, in the order in which it is queued."""
        # A peek must not wait for what is queued.
        self._peeking = self._new_stream()

    def held(self) -> AbstractContextManager[object]:
        return self.DEVICE

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size))
        weakref.finalize(self, _free, self._runtime, address)
        self._call("cudaMemsetAsync", address, 0, ctypes.c_size_t(size), self._handle(self.stream))
        return Buffer("cuda", dtype, shape, address.value or 0, None)

    def write(self, buffer: Buffer, row: int, values: NDArray[Any]) -> None:
        source = np.ascontiguousarray(values, buffer.dtype)
        target = buffer.address + row * buffer.row_bytes
        # Usually the array has been copied when the call returns, but that is not guaranteed.
        self._written.append(source)
        self._copy(target, source.ctypes.data, source.nbytes, TO_DEVICE, self.stream)

    def read(self, buffer: Buffer, row: int, count: int) -> NDArray[Any]:
        return self._fetch(buffer, row, count, self.stream)

    def peek(self, buffer: Buffer, row: int, count: int) -> NDArray[Any]:
        return self._fetch(buffer, row, count, self._peeking)

    def copy_row(self, buffer: Buffer, source: int, target: int) -> None:
        to, from_ = (buffer.address + row * buffer.row_bytes for row in (target, source))
        self._copy(to, from_, buffer.row_bytes, ON_DEVICE, self.stream)

    def copy_tokens(self, cache: Buffer, source: int, target: int, tokens: int) -> None:
        _, heads, context, width = cache.shape
        token_bytes = width * np.dtype(cache.dtype).itemsize
        pitch = ctypes.c_size_t(context * token_bytes)
        to, from_ = (ctypes.c_void_p(cache.address + slot * cache.row_bytes) for slot in (target, source))
        self._call(
            "cudaMemcpy2DAsync",
            to,
            pitch,
            from_,
            pitch,
            ctypes.c_size_t(tokens * token_bytes),
            ctypes.c_size_t(heads),
            ON_DEVICE,
            self._handle(self.stream),
        )

    def room(self) -> tuple[int, int]:
        """Return the GPU's free and total memory in bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _fetch(self, buffer: Buffer, row: int, count: int, stream: int) -> NDArray[Any]:
        found = np.empty((count, *buffer.shape[1:]), buffer.dtype)
        self._copy(found.ctypes.data, buffer.address + row * buffer.row_bytes, found.nbytes, TO_HOST, stream)
        self._call("cudaStreamSynchronize", self._handle(stream))
        return found

    def _copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        to, from_ = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._call("cudaMemcpyAsync", to, from_, ctypes.c_size_t(size), kind, self._handle(stream))

    def _new_stream(self) -> int:
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), NON_BLOCKING)
        return stream.value or 0

    @staticmethod
    def _handle(stream: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._runtime, name)(*arguments)
        if code:
            # Clear the error, or ONNX Runtime, which asks for the last error after a launch, would take it for its own.
            self._runtime.cudaGetLastError()
        if code == OUT_OF_MEMORY and name == "cudaMalloc":
            raise UserError("slots: the GPU's memory does not hold this many; ask for fewer")
        if code:
            raise RuntimeError(f"{name}: {self._runtime.cudaGetErrorString(code).decode()}")


def _free(runtime: ctypes.CDLL, address: ctypes.c_void_p) -> None:
    with CudaMemory.DEVICE:
        runtime.cudaFree(address)


def _array(buffer: Buffer) -> NDArray[Any]:
    if buffer.array is None:
        raise ValueError("the buffer is on a GPU")
    return buffer.array
