"""What made a run: commit, data, base, machine and libraries, as tags; and what was changed for it."""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from pipeline import machine
from pipeline.files import read_jsonl
from pipeline.params.section import parse_yaml, read_yaml
from pipeline.tracking.tags import COMMIT_TAG, DATA_TAG, DIRTY_TAG, EXPERIMENT_TAG

LOCK_FILE = Path("dvc.lock")
SHOWN_CHANGES = 3
"""The most changes that a name lists."""
LONGEST_VALUE = 40
"""The longest value that names and notes show, in characters: the id of a model on the hub, but no prompt."""
_MISSING = object()


def lineage() -> dict[str, str]:
    """Return tags that lead from a run to what made it. Tags whose value is unknown are left out."""
    checkout = machine.read_checkout(Path.cwd())
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or (checkout and checkout.commit)
    lock = read_lock()
    tags = {
        MLFLOW_GIT_COMMIT: commit,
        # The same again under a name that the UI shows.
        COMMIT_TAG: commit,
        DIRTY_TAG: checkout and str(checkout.is_changed).lower(),
        EXPERIMENT_TAG: os.environ.get("DVC_EXP_NAME"),
        DATA_TAG: data_md5(lock),
        "dvc.base_md5": base_md5(lock),
        "machine.platform": platform.platform(),
        "machine.python": platform.python_version(),
        "machine.cpu": f"{machine.processor_name()}, {os.cpu_count()} cores",
        "machine.gpu": machine.gpu_names(),
        **{f"library.{name}": version for name, version in machine.versions().items()},
    }
    return {name: value for name, value in tags.items() if value}


def select_short(tags: Mapping[str, str]) -> dict[str, str]:
    """Return those tags of a run that lead from a version to what made it."""
    return {name: tags[name] for name in (COMMIT_TAG, DIRTY_TAG, DATA_TAG) if name in tags}


def digest_texts(documents: Path) -> str:
    """Return the SHA-256 of a split's texts, in any order: titles, file names and rows are no part of it."""
    digests = sorted(hashlib.sha256(row["text"].encode()).hexdigest() for row in read_jsonl(documents))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_lock() -> dict[str, Any]:
    """Return what the current `dvc.lock` says; nothing if there is none."""
    return read_yaml(LOCK_FILE) or {} if LOCK_FILE.exists() else {}


def data_md5(lock: Mapping[str, Any]) -> str | None:
    """Return DVC's hash of the texts that `prepare` read, by a `dvc.lock`; None if unknown.

    They are a folder, or an address on an object store: the dependency of the stage that is no code.
    """
    read = [part for part in _parts(lock, "prepare", "deps") if not part["path"].startswith("pipeline/")]
    return read[0].get("md5") if read else None


def base_md5(lock: Mapping[str, Any]) -> str | None:
    """Return DVC's hash of the model that `base` made, by a `dvc.lock`; None if unknown."""
    made = _parts(lock, "base", "outs")
    return made[0].get("md5") if made else None


def changes(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs from the last state that was committed, by `dvc.lock`: `data`, and parameters by name.

    Parameters have their new values, long ones shortened. Returns nothing without a committed `dvc.lock`.
    """
    text = machine.read_committed(Path.cwd(), LOCK_FILE)
    if text is None:
        return {}
    committed = parse_yaml(text, LOCK_FILE) or {}
    # What a model is called and said to be does not change it.
    sections = [section for section in parameters if section != "register"]
    now = flatten({section: parameters[section] for section in sections})
    before: dict[str, Any] = {}
    for stage in committed.get("stages", {}).values():
        locked = stage.get("params", {}).get("params.yaml", {})
        before |= flatten({section: locked[section] for section in sections if section in locked})
    found = {name: shorten(value) for name, value in now.items() if before.get(name, _MISSING) != value}
    found |= {name: "removed" for name in before if name not in now}
    is_new = data_md5(read_lock()) not in (None, data_md5(committed))
    return {"data": "new", **found} if is_new else found


def describe(changes: Mapping[str, str]) -> str:
    """Return the changes in a few words, such as `new data, epochs 5`; empty if there is none."""
    leaves = Counter(name.rpartition(".")[2] for name in changes)
    words = [
        "new data" if name == "data" else f"{name if leaves[leaf] > 1 else leaf} {value}"
        for name, value in changes.items()
        for leaf in (name.rpartition(".")[2],)
    ]
    more = [f"{len(words) - SHOWN_CHANGES} more"] if len(words) > SHOWN_CHANGES else []
    return ", ".join(words[:SHOWN_CHANGES] + more)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with keys joined by dots and lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return flat


def shorten(value: Any) -> str:
    """Return a parameter as text, or `changed` if that is long."""
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else "changed"


def _parts(lock: Mapping[str, Any], stage: str, kind: Literal["deps", "outs"]) -> list[dict[str, Any]]:
    """Return the dependencies or outputs of a stage."""
    found: list[dict[str, Any]] = lock.get("stages", {}).get(stage, {}).get(kind, [])
    return found
