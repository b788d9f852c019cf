"""The machine: what it is, what is installed on it, and how fast it reads memory. Most of it on Linux only."""

import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np

CPU_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
             "amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
"""Of those that the processor names, the ones on which the speed of matrices depends."""

DISTRIBUTIONS = ("numpy", "torch", "transformers", "optimum", "optimum-onnx", "onnxruntime-gpu", "onnxruntime",
                 "ctranslate2", "llama-cpp-python", "gguf")  # fmt: skip

BANDWIDTH_BYTES = 2**30
"""Read in one pass; far more than any cache holds."""
BANDWIDTH_PASSES = 10


def physical_cores() -> int:
    """Cores that this process may run on, siblings of one core counted once."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    siblings = {
        path.read_text().strip()
        for core in allowed
        if (path := Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")).is_file()
    }
    return len(siblings) or len(allowed)


def read_bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read, the best of several passes.

    A sum of float64 is the simplest pass that waits for nothing but memory: NumPy adds eight bytes at a time, with
    vector instructions, and lets other threads run meanwhile.
    """
    parts = np.array_split(np.ones(BANDWIDTH_BYTES // 8), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_PASSES):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            seconds.append(time.perf_counter() - started)
    return BANDWIDTH_BYTES / min(seconds)


def describe() -> dict[str, str]:
    """Processor, memory, system and versions, as lines of a table. No names or paths of this machine."""
    facts = {"processor": platform.machine(), "cores": str(physical_cores())}
    if sys.platform == "linux":
        cpu = Path("/proc/cpuinfo").read_text()
        flags = set(_field(cpu, "flags|Features").split())
        facts = {
            "processor": _field(cpu, "model name") or platform.machine(),
            "instructions": " ".join(flag for flag in CPU_FLAGS if flag in flags),
            "cores": f"{physical_cores()} physical, {len(os.sched_getaffinity(0))} logical",
            "memory": f"{total_memory() / 2**30:.1f} GiB",
        }
    return {
        **facts,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{name} {found}" for name in DISTRIBUTIONS if (found := version(name))),
        "commit": commit(),
    }


def version(distribution: str) -> str:
    """The installed version of a package, empty where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of this repository, and whether the tree differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", changed" if changed else "")


def cpu_seconds(process_id: int) -> float:
    """Processor time that a process has used, all threads."""
    # The name of the process, in brackets, may hold spaces; user and system time are fields 14 and 15.
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def total_memory() -> int:
    """Bytes."""
    return _kib(Path("/proc/meminfo"), "MemTotal")


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    return _kib(Path("/proc/meminfo"), "MemAvailable")


def reset_peak_memory() -> None:
    """Let the high-water mark of this process begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes that this process held in memory at most since the last reset, mapped files among them."""
    return _kib(Path("/proc/self/status"), "VmHWM")


def _kib(file: Path, name: str) -> int:
    """A line such as `MemTotal: 24684124 kB`, in bytes."""
    return 1024 * int(_field(file.read_text(), name).split()[0])


def _field(text: str, name: str) -> str:
    found = re.search(rf"^(?:{name})\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""
