"""Facts about this machine, its libraries and the git checkout, for reports and for the tags of runs."""

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from pipeline.cores import allowed_cores, physical_cores, threads_within_quota

CPU_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
             "amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
"""The processor's features that decide how fast it multiplies matrices."""

LIBRARIES = ("numpy", "torch", "transformers", "tokenizers", "optimum", "optimum-onnx", "onnx", "onnxruntime-gpu",
             "onnxruntime", "mlflow", "dvc")  # fmt: skip
"""The distributions whose versions can change results or speed."""

CPU_FILE = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Checkout:
    """The state of a git checkout."""

    commit: str
    is_changed: bool
    """Whether files differ from the commit, new ones included. `dvc.lock` does not count: every stage changes it."""


def describe(more_libraries: Sequence[str] = ()) -> dict[str, str]:
    """Return processor, memory, system, versions and commit as the lines of a table.

    Names no user, host or path. `more_libraries` are distributions to list after `LIBRARIES`.
    """
    checkout = read_checkout(Path(__file__).parents[1])
    facts = {
        "processor": processor_name(),
        "instructions": " ".join(flag for flag in CPU_FLAGS if flag in _cpu_field("flags|Features").split()),
        "cores": describe_cores(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "libraries": ", ".join(
            f"{name} {version}" for name, version in versions((*LIBRARIES, *more_libraries)).items()
        ),
        "commit": "unknown" if checkout is None else checkout.commit[:7] + (", changed" if checkout.is_changed else ""),
    }
    return {name: value for name, value in facts.items() if value}


def describe_cores() -> str:
    """Return how many cores this process may run on, and its quota if that is less."""
    quota = threads_within_quota()
    return f"{physical_cores()} physical, {len(allowed_cores())} logical" + (
        "" if quota is None else f", a quota of {quota}"
    )


def processor_name() -> str:
    """Return the processor's model, or its architecture if the system does not know the model."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def gpu_names() -> str | None:
    """Return the names of NVIDIA's GPUs, or None if nvidia-smi is not installed."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return ", ".join(subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines())


def versions(distributions: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Return the versions of the distributions that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_checkout(folder: Path) -> Checkout | None:
    """Return the state of the git checkout in `folder`, or None without git or a commit."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", ".", ":!dvc.lock")
    return None if commit is None or changes is None else Checkout(commit, bool(changes))


def read_committed(folder: Path, file: Path) -> str | None:
    """Return the text of a file, relative to `folder`, as it is in the last commit; None without git or the file."""
    return _git(folder, "show", f"HEAD:./{file.as_posix()}")


def _git(folder: Path, *arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_field(name: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo; empty if it is missing."""
    text = CPU_FILE.read_text() if CPU_FILE.is_file() else ""
    found = re.search(rf"^(?:{name})\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""
